import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
const url = process.argv[2];
const asked = { prompt: "Hello", maxOutputTokens: 6, temperature: 0 };
const kvist = createOpenAICompatible({ name: "kvist", baseURL: `${url}/v1` });
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const anthropic = createAnthropic({ baseURL: `${url}/v1`, apiKey: "none" });
const stream = streamText({ ...asked, model: kvist("tiny") });
let streamed = "";
for await (const piece of stream.textStream) streamed += piece;
const text = async (model) => (await generateText({ ...asked, model })).text;
console.log(
  "\n" +
    JSON.stringify({
      text: await text(kvist("tiny")),
      streamed,
      responses: await text(openai("tiny")),
      anthropic: await text(anthropic("tiny")),
    }),
);
