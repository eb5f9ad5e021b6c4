// Next-token probabilities of llama.cpp, for a base model with each of several adapters.
//
// stdin:  {"base": "base.gguf", "adapters": [["a.gguf"], ["b.gguf", 0.5], []], "tokens": [1, 2, ...], "vocabulary": 49152}
// stdout: {"probabilities": [base64 of float32 (tokens, vocabulary), ...]}, in the order of "adapters"
import {getLlama} from "node-llama-cpp";

const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const {base, adapters, tokens, vocabulary} = JSON.parse(Buffer.concat(chunks).toString());

const llama = await getLlama({build: "never", gpu: false, skipDownload: true, logLevel: "error"});
const model = await llama.loadModel({modelPath: base, gpuLayers: 0});
// The raw softmax: temperature 0 would leave one token, and the cuts would drop the tail.
const everything = {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}};

const probabilities = [];
for (const [filePath, scale] of adapters) {
    const context = await model.createContext({
        contextSize: Math.max(64, tokens.length + 1),
        lora: filePath ? {adapters: [{filePath, scale: scale ?? 1}]} : undefined,
        threads: 1, // more of them spin for one another wherever something else runs
        flashAttention: false,
        experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32"
    });
    const outputs = await context.getSequence().controlledEvaluate(
        tokens.map((token) => [token, {generateNext: everything}])
    );
    const values = new Float32Array(tokens.length * vocabulary);
    outputs.forEach((output, position) => {
        for (const [token, probability] of output.next.probabilities)
            values[position * vocabulary + token] = probability;
    });
    probabilities.push(Buffer.from(values.buffer).toString("base64"));
    await context.dispose();
}
process.stdout.write(JSON.stringify({probabilities}), () => process.exit(0));
