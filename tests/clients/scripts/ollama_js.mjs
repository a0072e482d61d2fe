import { Ollama } from "ollama";
const client = new Ollama({ host: process.argv[2] });
const asked = {
  model: "tiny",
  messages: [{ role: "user", content: "Hello" }],
  options: { temperature: 0, num_predict: 6 },
};
const answer = await client.chat(asked);
let streamed = "";
for await (const part of await client.chat({ ...asked, stream: true })) streamed += part.message.content;
const listed = await client.list();
console.log(
  "\n" + JSON.stringify({ text: answer.message.content, streamed, models: listed.models.map((model) => model.name) }),
);
