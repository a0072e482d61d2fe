import ollama
from common import ASKED, CITY, MODEL, TOKENS, URL, tell

client = ollama.Client(host=URL)
asked = {
    "model": MODEL,
    "messages": [{"role": "user", "content": ASKED}],
    "options": {"temperature": 0, "num_predict": TOKENS, "num_ctx": 2048},
}
long = {**asked, "options": {"temperature": 0, "num_predict": 200}}
tell(
    text=client.chat(**asked).message.content,
    streamed="".join(part.message.content or "" for part in client.chat(**asked, stream=True)),
    generated=client.generate(model=MODEL, prompt=ASKED, options=asked["options"]).response,
    structured=client.chat(**long, format=CITY).message.content,
    models=[model.model for model in client.list().models],
    running=[model.model for model in client.ps().models],
    capabilities=client.show(MODEL).capabilities,
    dimensions=len(client.embed(model=MODEL, input="a").embeddings[0]),
)
