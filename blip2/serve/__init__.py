"""The server: one model that answers many at once, as OpenAI's clients and plain HTTP speak.

app = create_app(lambda: Models(blip2.load()))      # an ASGI application
run(app, host="127.0.0.1", port=8000)               # until a stop signal; `blip2 serve` is this

a request    doorman (key, queue, bytes)  ->  pictures (bytes to pixels)  ->  worker (the model's thread)
an answer    worker                       ->  openai or plain             ->  JSON, or events as it is written
"""
