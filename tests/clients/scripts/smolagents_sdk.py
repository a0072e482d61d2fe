from common import ASKED, KEY, MODEL, TOKENS, URL, tell
from smolagents import OpenAIServerModel

model = OpenAIServerModel(model_id=MODEL, api_base=f"{URL}/v1", api_key=KEY, temperature=0, max_tokens=TOKENS)
asked = [{"role": "user", "content": [{"type": "text", "text": ASKED}]}]
tell(text=model.generate(asked).content)
