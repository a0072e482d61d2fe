from common import ASKED, KEY, MODEL, TOKENS, URL, tell
from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai_like import OpenAILike

asked = [ChatMessage(role="user", content=ASKED)]
like = OpenAILike(
    model=MODEL, api_base=f"{URL}/v1", api_key=KEY, is_chat_model=True, temperature=0, max_tokens=TOKENS,
    context_window=2048,
)  # fmt: skip
ollama = Ollama(
    model=MODEL, base_url=URL, temperature=0, context_window=2048, additional_kwargs={"num_predict": TOKENS}
)
embedding = OpenAILikeEmbedding(model_name=MODEL, api_base=f"{URL}/v1", api_key=KEY)
tell(
    text=like.chat(asked).message.content,
    ollama=ollama.chat(asked).message.content,
    dimensions=len(embedding.get_text_embedding("a")),
)
