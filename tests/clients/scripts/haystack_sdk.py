from common import ASKED, KEY, MODEL, TOKENS, URL, tell
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret

generator = OpenAIChatGenerator(
    model=MODEL,
    api_base_url=f"{URL}/v1",
    api_key=Secret.from_token(KEY),
    generation_kwargs={"temperature": 0, "max_tokens": TOKENS},
)
tell(text=generator.run([ChatMessage.from_user(ASKED)])["replies"][0].text)
