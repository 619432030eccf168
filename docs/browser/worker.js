// Samples exported networks in a worker, with onnxruntime-web, as examples/onnx_sampling.py does: students of `lamamba
// distill` in their ancestral steps, other networks by UniPC. All predict the velocity of flow matching. Messages in:
// {open: network}; {id, network, label, seed, steps, guidance, device}; {stop: true}. Messages out: {network, properties,
// hasGpu}; {id, step, image} after each step; {error}.
const file = (name) => new URL(name, import.meta.url).href;
const runtimes = {
  wasm: ["./ort/ort.wasm.bundle.min.mjs", "./ort/ort-wasm-simd-threaded.wasm"],
  webgpu: ["./ort/ort.webgpu.bundle.min.mjs", "./ort/ort-wasm-simd-threaded.asyncify.wasm"],
};
const kept = {};

/** Call `make` once per name, and keep its result. After an error, the next call tries again. */
function once(name, make) {
  kept[name] ??= make();
  kept[name].catch(() => delete kept[name]);
  return kept[name];
}

const fetched = (name) =>
  once(name, async () => {
    const [properties, weights] = await Promise.all([
      fetch(file(`${name}.json`)).then((answer) => answer.json()),
      fetch(file(`${name}.onnx`)).then((answer) => answer.arrayBuffer()),
    ]);
    return { properties, weights };
  });

/** Load the runtime of a device, "wasm" or "webgpu", and a network into it. */
const opened = (name, device) =>
  once(`${name} ${device}`, async () => {
    const [bundle, wasm] = runtimes[device];
    const ort = await import(bundle);
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = 1; // several threads need HTTP headers that simple web servers do not send
    ort.env.wasm.wasmPaths = { wasm: file(wasm) };
    const { weights } = await fetched(name);
    return { ort, session: await ort.InferenceSession.create(new Uint8Array(weights), { executionProviders: [device] }) };
  });

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

/** The share of noise before each step and after the last; the first is just below 1, as in diffusers. */
function noiseShares(steps) {
  const shares = Array.from({ length: steps }, (_, i) => Math.fround(i === 0 ? 1 - 1e-6 : 1 - (0.999 * i) / steps));
  return [...shares, 0];
}

const logSignalToNoise = (share) => Math.log(Math.fround(1 - share) / share);

/**
 * Take step i by UniPC of second order (arXiv 2302.04867): the predictor, or, given the clean image predicted after the
 * step, the corrector.
 */
function takeStep(x, i, shares, before, image, after) {
  const [share, next] = [shares[i], shares[i + 1]];
  const length = logSignalToNoise(next) - logSignalToNoise(share);
  const growth = Math.expm1(-length);
  const ratio = before === null ? 0 : length / (logSignalToNoise(share) - logSignalToNoise(shares[i - 1]));
  let [changeWeight, afterWeight] = [0.5, 0];
  if (after !== null && before === null) afterWeight = 0.5;
  else if (after !== null) {
    const first = (growth / -length - 1) / growth;
    const second = (2 * ((growth / -length - 1) / -length - 0.5)) / growth;
    changeWeight = (first - second) / (1 + 1 / ratio);
    afterWeight = first - changeWeight;
  }
  return x.map((value, j) => {
    let extrapolated = image[j];
    if (before !== null) extrapolated += changeWeight * ratio * (image[j] - before[j]);
    if (after !== null) extrapolated += afterWeight * (after[j] - image[j]);
    return (next / share) * value - (1 - next) * growth * extrapolated;
  });
}

/** Yield the clean image that the network predicts before each step of UniPC. */
async function* takeUniPCSteps(steps, noise, predict) {
  const shares = noiseShares(steps);
  let [x, start, before, last] = [noise, null, null, null]; // start: the corrected x before the step that led to x
  for (let i = 0; i < steps; i++) {
    const image = await predict(x, shares[i]);
    yield image;
    if (i + 1 < steps) {
      start = i === 0 ? x : takeStep(start, i - 1, shares, before, last, image);
      x = takeStep(start, i, shares, last, image, null);
      [before, last] = [last, image];
    }
  }
}

/** Yield the clean image before each ancestral step of a student. noise: the initial noise, then that of each step. */
async function* takeAncestralSteps(shares, noise, predict) {
  const length = noise.length / shares.length;
  let x = noise.subarray(0, length);
  for (const [i, share] of shares.entries()) {
    const image = await predict(x, share);
    yield image;
    if (i + 1 < shares.length) {
      const next = shares[i + 1];
      const ratio = (1 - share) / (1 - next);
      const variance = share ** 2 - (ratio * next) ** 2;
      const ofX = ratio * (next / share) ** 2;
      const ofImage = ((1 - next) * variance) / share ** 2;
      const ofNoise = (Math.sqrt(variance) * next) / share;
      x = x.map((value, j) => ofX * value + ofImage * image[j] + ofNoise * noise[(i + 1) * length + j]);
    }
  }
}

let newest = 0; // a new request ends the one before

async function sample({ id, network, label, seed, steps, guidance, device }) {
  const own = ++newest;
  const { properties } = await fetched(network);
  const { ort, session } = await opened(network, device);
  const shape = [1, properties.channels, ...properties.size];
  const length = shape.reduce((a, b) => a * b);

  /** Predict the clean image of x, from the share of noise in x. */
  async function predict(x, share) {
    const out = await session.run({
      x_t: new ort.Tensor("float32", x, shape),
      t: new ort.Tensor("float32", [share * properties.num_timesteps], [1]),
      y: new ort.Tensor("int64", [BigInt(label)], [1]),
      ...(properties.guided && { guidance: new ort.Tensor("float32", [guidance], []) }),
    });
    const velocity = out.prediction.data;
    return x.map((value, j) => Math.max(-1, Math.min(1, value - share * velocity[j])));
  }

  const shares = properties.timesteps?.map((t) => t / properties.num_timesteps); // only students have timesteps
  if (shares) steps = shares.length;
  const noise = drawNoise(seed, shares ? steps * length : length);
  const images = shares ? takeAncestralSteps(shares, noise, predict) : takeUniPCSteps(steps, noise, predict);
  let [step, began] = [0, performance.now()];
  for await (const image of images) {
    if (own !== newest) return;
    postMessage({ id, step: ++step, steps, image, noise, milliseconds: performance.now() - began });
    await new Promise((resolve) => setTimeout(resolve)); // lets a new request in
    began = performance.now();
  }
}

/** Load a network for the processor, and post its properties. */
async function open(network) {
  newest++;
  const [{ properties }] = await Promise.all([fetched(network), opened(network, "wasm")]);
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  postMessage({ network, properties, hasGpu: Boolean(adapter) });
}

onmessage = ({ data }) => {
  if (data.stop) newest++;
  else (data.open ? open(data.open) : sample(data)).catch((error) => postMessage({ error: String(error) }));
};
