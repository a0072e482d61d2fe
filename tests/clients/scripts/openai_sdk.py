import openai
from common import ASKED, CITY, KEY, MODEL, TOKENS, URL, tell

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY)
asked = {"model": MODEL, "messages": [{"role": "user", "content": ASKED}], "max_tokens": TOKENS, "temperature": 0}
stream = client.chat.completions.create(**asked, stream=True)
tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
called = client.chat.completions.create(
    **{**asked, "max_tokens": 200}, tools=[tool], tool_choice={"type": "function", "function": {"name": "weather"}}
)
response = client.responses.create(model=MODEL, input=ASKED, max_output_tokens=TOKENS, temperature=0)
azure = openai.AzureOpenAI(azure_endpoint=URL, api_key=KEY, api_version="2024-10-21")
tell(
    text=client.chat.completions.create(**asked).choices[0].message.content,
    streamed="".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices),
    responses=response.output_text,
    azure=azure.chat.completions.create(**asked).choices[0].message.content,
    arguments=called.choices[0].message.tool_calls[0].function.arguments,
    models=[model.id for model in client.models.list()],
    dimensions=len(client.embeddings.create(model=MODEL, input="a").data[0].embedding),
)
