"""LangChain. pip install langchain-openai; python ask_langchain.py http://127.0.0.1:8000/v1 photo.jpg"""

import base64
import sys
from pathlib import Path

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

address, picture = sys.argv[1:]
options = {"base_url": address, "api_key": "none", "model": "blip2"}
message = HumanMessage(
    content=[
        {"type": "text", "text": "what is in the picture?"},
        {"type": "image", "base64": base64.b64encode(Path(picture).read_bytes()).decode(), "mime_type": "image/png"},
    ]
)

chat = ChatOpenAI(**options)
print(chat.invoke([message]).content)
print("".join(chunk.content for chunk in chat.stream([message])))
# Without the last option it sends numbers of OpenAI's own tokens in place of the text.
embeddings = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
print(len(embeddings.embed_query("two dogs")))
