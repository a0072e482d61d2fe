from typing import Literal

import instructor
import openai
from common import ASKED, KEY, MODEL, URL, tell
from pydantic import BaseModel, ConfigDict


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris"]


def city(mode: instructor.Mode) -> str:
    client = instructor.from_openai(openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY), mode=mode)
    asked = {"model": MODEL, "messages": [{"role": "user", "content": ASKED}], "temperature": 0}
    if mode is instructor.Mode.TOOLS:
        asked["parallel_tool_calls"] = False
    return client.chat.completions.create(**asked, response_model=Place).city


tell(tools=city(instructor.Mode.TOOLS), json_schema=city(instructor.Mode.JSON_SCHEMA))
