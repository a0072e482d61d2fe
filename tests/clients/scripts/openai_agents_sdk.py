from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, set_tracing_disabled
from common import ASKED, KEY, MODEL, TOKENS, URL, tell
from openai import AsyncOpenAI

set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY)
settings = ModelSettings(temperature=0, max_tokens=TOKENS)


def text(model: object) -> str:
    return Runner.run_sync(Agent(name="one", model=model, model_settings=settings), ASKED).final_output


tell(
    text=text(OpenAIChatCompletionsModel(MODEL, client)),
    responses=text(OpenAIResponsesModel(MODEL, client)),
)
