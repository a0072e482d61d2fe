from typing import Literal

from common import ASKED, KEY, MODEL, TOKENS, URL, tell
from langchain_anthropic import ChatAnthropic
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Place(BaseModel, extra="forbid"):
    """Where, and nothing beside it: a tool that is not strict leaves the model free to add what it likes."""

    city: Literal["Paris"]


one = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, temperature=0, max_tokens=TOKENS)
free = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, temperature=0)
two = ChatAnthropic(model=MODEL, base_url=URL, api_key=KEY, temperature=0, max_tokens=TOKENS)
three = ChatOllama(model=MODEL, base_url=URL, temperature=0, num_predict=TOKENS)
tell(
    text=one.invoke(ASKED).content,
    streamed="".join(chunk.content for chunk in one.stream(ASKED)),
    anthropic=two.invoke(ASKED).content,
    ollama=three.invoke(ASKED).content,
    city=free.with_structured_output(Place, method="json_schema").invoke(ASKED).city,
    called=free.with_structured_output(Place, method="function_calling").invoke(ASKED).city,
    structured_ollama=ChatOllama(model=MODEL, base_url=URL, temperature=0)
    .with_structured_output(Place)
    .invoke(ASKED)
    .city,
    dimensions=len(OllamaEmbeddings(model=MODEL, base_url=URL).embed_query("a")),
)
