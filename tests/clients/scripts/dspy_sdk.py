import dspy
from common import ASKED, KEY, MODEL, TOKENS, URL, tell

model = dspy.LM(f"openai/{MODEL}", api_base=f"{URL}/v1", api_key=KEY, temperature=0, max_tokens=TOKENS, cache=False)
(answer,) = model(ASKED)
tell(text=answer if isinstance(answer, str) else answer["text"])
