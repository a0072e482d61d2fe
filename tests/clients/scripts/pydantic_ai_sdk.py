from typing import Literal

from common import ASKED, KEY, MODEL, TOKENS, URL, tell
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Place(BaseModel):
    city: Literal["Paris"]


model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY)))
text = Agent(model, model_settings={"temperature": 0, "max_tokens": TOKENS}).run_sync(ASKED).output
place = Agent(model, output_type=Place, model_settings={"temperature": 0}).run_sync(ASKED).output
tell(text=text, city=place.city)
