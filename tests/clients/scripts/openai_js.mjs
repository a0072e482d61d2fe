import OpenAI from "openai";
const url = process.argv[2];
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const asked = { model: "tiny", messages: [{ role: "user", content: "Hello" }], max_tokens: 6, temperature: 0 };
const answer = await client.chat.completions.create(asked);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
const response = await client.responses.create({ model: "tiny", input: "Hello", max_output_tokens: 6, temperature: 0 });
console.log(
  "\n" + JSON.stringify({ text: answer.choices[0].message.content, streamed, responses: response.output_text }),
);
