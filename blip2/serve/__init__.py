"""The HTTP server: one model that batches many requests, with OpenAI's API and plain endpoints.

    app = create_app(lambda: Models(blip2.load()))      # an ASGI application
    run(app, host="127.0.0.1", port=8000)               # until a stop signal; `blip2 serve` is this

    a request  admission (key, queue, bytes)  ->  pool (a process parses it: fields, pixels)  ->  openai or plain
    an answer    worker (the model's thread)  ->  openai or plain  ->  JSON, or events while it is generated
"""
