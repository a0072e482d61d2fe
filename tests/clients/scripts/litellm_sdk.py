import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
from common import ASKED, KEY, MODEL, TOKENS, URL, tell

litellm.telemetry = False
asked = {"messages": [{"role": "user", "content": ASKED}], "max_tokens": TOKENS, "temperature": 0, "api_key": KEY}


def text(model: str, base: str) -> str:
    return litellm.completion(model=model, api_base=base, **asked).choices[0].message.content


tell(
    text=text(f"openai/{MODEL}", f"{URL}/v1"),
    anthropic=text(f"anthropic/{MODEL}", URL),
    ollama=text(f"ollama_chat/{MODEL}", URL),
    ranked=[
        result["index"]
        for result in litellm.rerank(
            model=f"cohere/{MODEL}", api_base=f"{URL}/v1/rerank", api_key=KEY, query="king", documents=["tree", "king"]
        ).results
    ],
)
