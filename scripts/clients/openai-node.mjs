// Run by openai-node, with the server in URL, KEY and MODEL.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { APICallError, Output, embed, generateText, stepCountIs, streamText, tool } from "ai";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";

const { URL: url, KEY: key, MODEL: model } = process.env;
const version = name => JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url))).version;
const options = { baseURL: url + "/v1", apiKey: key, maxRetries: 0 };
const client = new OpenAI(options);
const ask = { model, messages: [{ role: "user", content: "넌 누구니?" }], temperature: 0, max_tokens: 40 };
const goOn = { model, prompt: "오늘은 날씨가", temperature: 0, max_tokens: 12 };
const metric = async name => {
  const line = (await (await fetch(url + "/metrics")).text()).split("\n").find(l => l.startsWith(`aoji:${name} `));
  return line ? Number(line.split(" ")[1]) : 0;
};
globalThis.AI_SDK_LOG_WARNINGS = false; // of every field that it sends to no completions API
let passed = 0, failed = 0;

async function check(name, run) {
  try {
    const said = await run();
    passed++;
    console.log(`ok    ${name}` + (said ? `: ${said}` : ""));
  } catch (error) {
    failed++;
    console.log(`FAIL  ${name}: ${error.stack}`);
  }
}

const whole = await client.chat.completions.create(ask);
const text = whole.choices[0].message.content;

await check("openai: models", async () => {
  const ids = [];
  for await (const m of client.models.list()) ids.push(m.id);
  assert(ids.includes(model));
  assert.equal((await client.models.retrieve(model)).id, model);
});

await check("openai: stream, usage in the last chunk only", async () => {
  const stream = await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } });
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  const last = chunks.pop();
  assert.deepEqual(last.choices, []);
  assert.equal(last.usage.total_tokens, whole.usage.total_tokens);
  assert(chunks.every(c => c.usage === null && c.choices.length === 1));
  assert.equal(chunks.map(c => c.choices[0].delta.content ?? "").join(""), text);
  assert.equal(chunks[0].choices[0].delta.role, "assistant");
  return text;
});

await check("openai: the helper's events", async () => {
  const stream = client.chat.completions.stream(ask);
  let heard = "";
  stream.on("content", delta => (heard += delta));
  const final = await stream.finalChatCompletion();
  assert.equal(heard, text);
  assert.equal(final.choices[0].message.content, text);
});

await check("openai: aborted in the middle, the answer ends on the server too", async () => {
  const cancelled = () => metric('request_cancelled_total{phase="decode"}');
  const before = await cancelled();
  const stream = await client.chat.completions.create({ ...ask, max_tokens: 900, n: 4, ignore_eos: true, stream: true });
  for await (const _ of stream) break;
  for (let i = 0; (await metric("num_requests_running")) + (await metric("num_requests_waiting")) > 0; i++) {
    assert(i < 100);
    await new Promise(done => setTimeout(done, 50));
  }
  assert((await cancelled()) > before);
});

const Fruit = z.object({ name: z.enum(["사과", "배", "감"]), pieces: z.int().min(0).max(9), ripe: z.boolean() });

await check("openai: parse, a zod schema", async () => {
  const reply = await client.chat.completions.parse({ ...ask, response_format: zodResponseFormat(Fruit, "fruit") });
  const fruit = Fruit.parse(reply.choices[0].message.parsed);
  return JSON.stringify(fruit);
});

await check("openai: completions, echo, log-probabilities, stream", async () => {
  const { choices: [choice] } = await client.completions.create({ ...goOn, max_tokens: 0, echo: true, logprobs: 1 });
  assert.equal(choice.text, goOn.prompt);
  assert.equal(choice.logprobs.token_logprobs[0], null);
  assert(choice.logprobs.token_logprobs.slice(1).every(x => x <= 0));
  const expected = (await client.completions.create(goOn)).choices[0].text;
  let streamed = "";
  for await (const chunk of await client.completions.create({ ...goOn, stream: true })) streamed += chunk.choices[0].text;
  assert.equal(streamed, expected);
});

const parameters = { type: "object", properties: { city: { enum: ["서울", "부산"] } }, required: ["city"], additionalProperties: false };
const weather = { type: "function", function: { name: "weather", parameters } };

await check("openai: tools, whole, as a stream, and run by the helper", async () => {
  const request = { ...ask, max_tokens: 120, tools: [weather], tool_choice: "required", parallel_tool_calls: false };
  const [call] = (await client.chat.completions.create(request)).choices[0].message.tool_calls;
  assert(["서울", "부산"].includes(JSON.parse(call.function.arguments).city));
  const final = await client.chat.completions.stream(request).finalChatCompletion();
  assert.equal(final.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
  const heard = [];
  const run = x => (heard.push(x.city), "맑음");
  const tools = [{ type: "function", function: { function: run, parse: JSON.parse, ...weather.function } }];
  const runner = client.chat.completions.runTools({ ...ask, max_tokens: 120, tools, tool_choice: { type: "function", function: { name: "weather" } } });
  await runner.finalFunctionToolCallResult();
  assert(heard.length > 0);
  return heard[0];
});

await check("openai: responses and embeddings", async () => {
  const request = { model, input: "넌 누구니?", temperature: 0, max_output_tokens: 40 };
  assert.equal((await client.responses.create(request)).output_text, text);
  let heard = "";
  for await (const e of await client.responses.create({ ...request, stream: true })) if (e.type === "response.output_text.delta") heard += e.delta;
  assert.equal(heard, text);
  const { data } = await client.embeddings.create({ model, input: ["하늘", "바다"] });
  assert(data.length === 2 && Math.abs(data[0].embedding.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-5);
});

await check("openai: exceptions", async () => {
  await assert.rejects(client.chat.completions.create({ ...ask, model: "gpt-9" }), e => e instanceof OpenAI.NotFoundError && e.code === "model_not_found");
  await assert.rejects(client.chat.completions.create({ ...ask, temperature: -1 }), e => e instanceof OpenAI.BadRequestError && e.param === "temperature");
  await assert.rejects(client.chat.completions.create({ ...ask, max_tokens: 1e6 }), e => e.code === "context_length_exceeded");
  if (key !== "any") await assert.rejects(new OpenAI({ ...options, apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
});

const provider = createOpenAICompatible({ name: "aoji", baseURL: options.baseURL, apiKey: key, includeUsage: true, supportsStructuredOutputs: true });
const prompt = { prompt: "넌 누구니?", temperature: 0, maxOutputTokens: 40, maxRetries: 0 };

await check("ai: generateText", async () => {
  const reply = await generateText({ model: provider(model), ...prompt });
  assert.equal(reply.text, text);
  assert.equal(reply.usage.outputTokens, whole.usage.completion_tokens);
  assert.equal(reply.finishReason, whole.choices[0].finish_reason);
});

await check("ai: streamText with usage", async () => {
  const reply = streamText({ model: provider(model), ...prompt });
  let heard = "";
  for await (const delta of reply.textStream) heard += delta;
  assert.equal(heard, text);
  assert.equal((await reply.usage).totalTokens, whole.usage.total_tokens);
});

await check("ai: generateText by a zod schema", async () => {
  const { output } = await generateText({ model: provider(model), ...prompt, output: Output.object({ schema: Fruit }) });
  return JSON.stringify(Fruit.parse(output));
});

await check("ai: completions", async () => {
  const reply = await generateText({ model: provider.completionModel(model), ...prompt, prompt: goOn.prompt, maxOutputTokens: 8 });
  assert(reply.text.length > 0 && reply.usage.outputTokens === 8);
});

await check("ai: tools, whole, as a stream, and steps with results", async () => {
  const heard = [];
  const tools = { weather: tool({ description: "날씨", inputSchema: z.object({ city: z.enum(["서울", "부산"]) }), execute: async ({ city }) => (heard.push(city), `${city}: 맑음`) }) };
  const request = { model: provider(model), ...prompt, maxOutputTokens: 200, tools, toolChoice: "required" };
  const reply = await generateText(request);
  assert(heard.length > 0 && reply.finishReason === "tool-calls" && reply.toolResults[0].output === `${heard[0]}: 맑음`);
  const stream = streamText(request);
  assert.equal((await stream.toolCalls)[0].input.city, heard[0]);
  const steps = await generateText({ ...request, toolChoice: "auto", stopWhen: stepCountIs(3) });
  assert(steps.steps.length >= 1);
  return heard[0];
});

await check("ai: Responses, embeddings, and Anthropic's messages", async () => {
  const newer = createOpenAI({ baseURL: options.baseURL, apiKey: key });
  assert.equal((await generateText({ model: newer.responses(model), ...prompt })).text, text);
  const stream = streamText({ model: newer.responses(model), ...prompt });
  assert.equal(await stream.text, text);
  assert((await embed({ model: provider.textEmbeddingModel(model), value: "하늘" })).embedding.length > 8);
  const messages = createAnthropic({ baseURL: options.baseURL, apiKey: key });
  assert.equal((await generateText({ model: messages(model), ...prompt })).text, text);
  assert.equal(await streamText({ model: messages(model), ...prompt }).text, text);
});

await check("ai: fields of the provider pass through, errors carry the message", async () => {
  const more = { providerOptions: { aoji: { seed: 3, stop: [text.slice(2, 5)] } } };
  assert.equal((await generateText({ model: provider(model), ...prompt, ...more })).text, text.slice(0, 2));
  await assert.rejects(generateText({ model: provider("gpt-9"), ...prompt }), e => APICallError.isInstance(e) && e.statusCode === 404 && /gpt-9/.test(e.message));
});

console.log(
  `openai ${version("openai")}, ai ${version("ai")}, @ai-sdk/openai-compatible ${version("@ai-sdk/openai-compatible")} (Node ${process.version}): ` +
    `${passed} checks passed` + (failed ? `, ${failed} FAILED` : ""));
process.exit(failed ? 1 : 0);
