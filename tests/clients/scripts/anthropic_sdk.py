import anthropic
from common import ASKED, CITY, KEY, MODEL, TOKENS, URL, tell

client = anthropic.Anthropic(base_url=URL, api_key=KEY)
asked = {"model": MODEL, "messages": [{"role": "user", "content": ASKED}], "max_tokens": TOKENS}
asked["extra_body"] = {"temperature": 0}  # which the client has no name for any more
with client.messages.stream(**asked) as stream:
    streamed = "".join(stream.text_stream)
tool = {"name": "weather", "input_schema": CITY}
called = client.messages.create(
    **{**asked, "max_tokens": 200}, tools=[tool], tool_choice={"type": "tool", "name": "weather"}
)
tell(
    text=client.messages.create(**asked).content[0].text,
    streamed=streamed,
    arguments=next(block.input for block in called.content if block.type == "tool_use"),
    models=[model.id for model in client.models.list()],
    model=client.models.retrieve(MODEL).id,
    counted=client.messages.count_tokens(model=MODEL, messages=asked["messages"]).input_tokens,
)
