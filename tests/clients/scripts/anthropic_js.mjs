import Anthropic from "@anthropic-ai/sdk";
const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none" });
const asked = { model: "tiny", messages: [{ role: "user", content: "Hello" }], max_tokens: 6, temperature: 0 };
const answer = await client.messages.create(asked);
const streamed = await client.messages.stream(asked).finalText();
const models = [];
for await (const model of client.models.list()) models.push(model.id);
console.log("\n" + JSON.stringify({ text: answer.content[0].text, streamed, models }));
