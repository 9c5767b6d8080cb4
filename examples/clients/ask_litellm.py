"""LiteLLM. pip install litellm; python ask_litellm.py http://127.0.0.1:8000/v1 photo.jpg"""

import base64
import sys
from pathlib import Path

from litellm import completion, embedding

address, picture = sys.argv[1:]
options = {"api_base": address, "api_key": "none", "model": "openai/blip2"}
url = "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
messages = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "what is in the picture?"},
            {"type": "image_url", "image_url": {"url": url}},
        ],
    }
]

print(completion(messages=messages, **options).choices[0].message.content)
stream = completion(messages=messages, stream=True, **options)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream))
print(len(embedding(input=["two dogs"], **options).data[0]["embedding"]))
