// Samples an exported network in a worker, with onnxruntime-web: DPM-Solver++(2M) with Karras' spacing of the steps, as
// examples/onnx_sampling.py does. Messages: {id, label, seed, steps, guidance, device} in; {id, step, image} after each
// step out.
const file = (name) => new URL(name, import.meta.url).href;
const runtimes = {
  wasm: ["./ort/ort.wasm.bundle.min.mjs", "./ort/ort-wasm-simd-threaded.wasm"],
  webgpu: ["./ort/ort.webgpu.bundle.min.mjs", "./ort/ort-wasm-simd-threaded.asyncify.wasm"],
};
const opened = {};

const network = (async () => {
  const [properties, weights] = await Promise.all([
    fetch(file("nano.json")).then((answer) => answer.json()),
    fetch(file("nano.onnx")).then((answer) => answer.arrayBuffer()),
  ]);
  return { properties, weights };
})();

/** Load the runtime of a device, "wasm" or "webgpu", and the network into it. */
async function load(device) {
  const [bundle, wasm] = runtimes[device];
  const ort = await import(bundle);
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1; // several threads need HTTP headers that simple web servers do not send
  ort.env.wasm.wasmPaths = { wasm: file(wasm) };
  const { weights } = await network;
  return { ort, session: await ort.InferenceSession.create(new Uint8Array(weights), { executionProviders: [device] }) };
}

/** Load once; after an error, the next call tries again. */
function open(device) {
  opened[device] ??= load(device);
  opened[device].catch(() => delete opened[device]);
  return opened[device];
}

/** Standard normal numbers from a seed: mulberry32 and the Box-Muller transform. */
function drawNoise(seed, length) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return (((mixed ^ (mixed >>> 14)) >>> 0) + 0.5) / 4294967296;
  };
  return Float32Array.from({ length }, () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()));
}

/** The timesteps, and the noise over signal before each step and after the last. */
function noiseLevels(schedule, steps) {
  const number = schedule.num_train_timesteps;
  const logs = [];
  for (let t = 0, kept = 1; t < number; t++) {
    kept *= 1 - (schedule.beta_start + ((schedule.beta_end - schedule.beta_start) * t) / (number - 1));
    logs.push(Math.log(1 / kept - 1) / 2);
  }
  const [most, least] = [Math.exp(logs[number - 1] / 7), Math.exp(logs[0] / 7)];
  const sigmas = Array.from({ length: steps }, (_, i) => (most + ((least - most) * i) / Math.max(1, steps - 1)) ** 7);
  const timesteps = sigmas.map((sigma) => {
    const above = Math.min(number - 1, Math.max(1, logs.findIndex((log) => log >= Math.log(sigma) - 1e-12)));
    return Math.round(above - 1 + (Math.log(sigma) - logs[above - 1]) / (logs[above] - logs[above - 1]));
  });
  return { timesteps, sigmas: [...sigmas, 0] };
}

let newest = 0; // a new request ends the one before

async function sample({ id, label, seed, steps, guidance, device }) {
  const own = ++newest;
  const { properties } = await network;
  const { ort, session } = await open(device);
  const shape = [1, properties.channels, ...properties.size];
  const length = shape.reduce((a, b) => a * b);
  const { timesteps, sigmas } = noiseLevels(properties.schedule, steps);
  const noise = drawNoise(seed, length);
  let [x, before, stepBefore] = [noise, null, 0];
  for (let i = 0; i < steps; i++) {
    const began = performance.now();
    const out = await session.run({
      x_t: new ort.Tensor("float32", x, shape),
      t: new ort.Tensor("float32", [timesteps[i]], [1]),
      y: new ort.Tensor("int64", [BigInt(label)], [1]),
      guidance: new ort.Tensor("float32", [guidance], []),
    });
    if (own !== newest) return;
    const predicted = out.prediction.data;
    const [sigma, next] = [sigmas[i], sigmas[i + 1]];
    const [signal, nextSignal] = [(1 + sigma ** 2) ** -0.5, (1 + next ** 2) ** -0.5];
    const image = x.map((value, j) => Math.max(-1, Math.min(1, value / signal - sigma * predicted[j])));
    if (next > 0) {
      const logStep = Math.log(sigma / next);
      const second = before === null ? 0 : logStep / (2 * stepBefore);
      const [ratio, weight] = [(next * nextSignal) / (sigma * signal), nextSignal * (1 - next / sigma)];
      const last = before ?? image;
      x = x.map((value, j) => ratio * value + weight * (image[j] + second * (image[j] - last[j])));
      [before, stepBefore] = [image, logStep];
    }
    postMessage({ id, step: i + 1, steps, image, noise, milliseconds: performance.now() - began });
    await new Promise((resolve) => setTimeout(resolve)); // lets a new request in
  }
}

onmessage = ({ data }) => {
  if (data.stop) newest++;
  else sample(data).catch((error) => postMessage({ error: String(error) }));
};
(async () => {
  const [{ properties }] = await Promise.all([network, open("wasm")]);
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  postMessage({ properties, hasGpu: Boolean(adapter) });
})().catch((error) => postMessage({ error: String(error) }));
