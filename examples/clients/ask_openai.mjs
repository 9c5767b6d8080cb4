// OpenAI's library. npm install openai; node ask_openai.mjs http://127.0.0.1:8000/v1 photo.jpg
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [address, picture] = process.argv.slice(2);
const client = new OpenAI({ baseURL: address, apiKey: "none" }); // or the server's key
const url = `data:image/png;base64,${readFileSync(picture).toString("base64")}`;
const messages = [
  { role: "user", content: [{ type: "text", text: "what is in the picture?" }, { type: "image_url", image_url: { url } }] },
];

const answer = await client.chat.completions.create({ model: "blip2", messages });
console.log(answer.choices[0].message.content);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ model: "blip2", messages, stream: true })) {
  streamed += chunk.choices[0]?.delta.content ?? "";
}
console.log(streamed);
const found = await client.embeddings.create({ model: "blip2", input: ["two dogs"] });
console.log(found.data[0].embedding.length);
