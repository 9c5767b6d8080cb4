"""OpenAI's library. pip install openai; python ask_openai.py http://127.0.0.1:8000/v1 photo.jpg"""

import base64
import sys
from pathlib import Path

from openai import OpenAI

address, picture = sys.argv[1:]
client = OpenAI(base_url=address, api_key="none")  # or the server's key
url = "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
messages = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "what is in the picture?"},
            {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        ],
    }
]

print(client.chat.completions.create(model="blip2", messages=messages).choices[0].message.content)
stream = client.chat.completions.create(model="blip2", messages=messages, stream=True)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream))
print(len(client.embeddings.create(model="blip2", input=["two dogs"]).data[0].embedding))
