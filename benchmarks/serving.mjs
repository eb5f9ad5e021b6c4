// Times of llama.cpp for a base model with each of several adapters, taken in turn.
//
// stdin:  {"base": "base.gguf", "adapters": ["a.gguf", null], "tokens": [1, 2, ...], "generated": 32, "rounds": 5}
// stdout: {"prompt": [[seconds of each round], ...], "generation": [[...], ...]}, in the order of "adapters"
import {getLlama} from "node-llama-cpp";

const chunks = [];
for await (const chunk of process.stdin) chunks.push(chunk);
const {base, adapters, tokens, generated, rounds} = JSON.parse(Buffer.concat(chunks).toString());

const llama = await getLlama({build: "never", gpu: false, skipDownload: true, logLevel: "error"});
const model = await llama.loadModel({modelPath: base, gpuLayers: 0});
const sequences = [];
for (const filePath of adapters) {
    const context = await model.createContext({
        contextSize: tokens.length + generated + 8,
        batchSize: tokens.length,
        lora: filePath ? {adapters: [{filePath, scale: 1}]} : undefined,
        threads: 1 // more of them spin for one another wherever something else runs
    });
    sequences.push(context.getSequence());
}

// CPU time: with one thread it is the wall time of a machine that does nothing else.
const seconds = (start) => {
    const {user, system} = process.cpuUsage(start);
    return (user + system) / 1e6;
};
const prompt = adapters.map(() => []);
const generation = adapters.map(() => []);
for (let round = -1; round < rounds; round++) { // round -1 warms up
    for (let place = 0; place < adapters.length; place++) {
        const i = (place + round + 1) % adapters.length; // each is first in turn
        const sequence = sequences[i];
        await sequence.clearHistory();
        let start = process.cpuUsage();
        await sequence.evaluateWithoutGeneratingNewTokens(tokens.slice(0, -1));
        const read = seconds(start);
        start = process.cpuUsage();
        let count = 0;
        for await (const _ of sequence.evaluate(tokens.slice(-1), {temperature: 0, yieldEogToken: true}))
            if (++count === generated) break;
        if (count !== generated) throw new Error(`${count} tokens were generated instead of ${generated}`);
        if (round < 0) continue;
        prompt[i].push(read);
        generation[i].push(seconds(start));
    }
}
process.stdout.write(JSON.stringify({prompt, generation}), () => process.exit(0));
