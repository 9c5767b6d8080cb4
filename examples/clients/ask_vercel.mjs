// Vercel's AI SDK. npm install ai @ai-sdk/openai @ai-sdk/openai-compatible;
// node ask_vercel.mjs http://127.0.0.1:8000/v1 photo.jpg
import { readFileSync } from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, generateText, streamText } from "ai";

const [baseURL, picture] = process.argv.slice(2);
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "blip2", baseURL });
const messages = [
  { role: "user", content: [{ type: "text", text: "what is in the picture?" }, { type: "image", image: readFileSync(picture) }] },
];

// .chat: openai("blip2") alone speaks OpenAI's newer interface, /v1/responses.
console.log((await generateText({ model: openai.chat("blip2"), messages })).text);
let streamed = "";
for await (const text of streamText({ model: compatible("blip2"), messages }).textStream) streamed += text;
console.log(streamed);
console.log((await embed({ model: openai.embedding("blip2"), value: "two dogs" })).embedding.length);
