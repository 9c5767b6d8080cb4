"""LlamaIndex. pip install llama-index-llms-openai-like llama-index-embeddings-openai-like;
python ask_llamaindex.py http://127.0.0.1:8000/v1 photo.jpg"""

import sys

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

address, picture = sys.argv[1:]
message = ChatMessage(role="user", blocks=[TextBlock(text="what is in the picture?"), ImageBlock(path=picture)])

# It sends a temperature of 0.1 if none is given, and then answers are drawn.
chat = OpenAILike(model="blip2", api_base=address, api_key="none", is_chat_model=True, temperature=0)
print(chat.chat([message]).message.content)
print("".join(part.delta or "" for part in chat.stream_chat([message])))
print(len(OpenAILikeEmbedding(model_name="blip2", api_base=address, api_key="none").get_text_embedding("two dogs")))
