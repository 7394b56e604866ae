// A reader of .kvb artifacts in plain JavaScript, written from artifacts/FORMAT.md: node examples/read_kvb.mjs FILE.kvb
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { argv, exit } from "node:process";
import { pathToFileURL } from "node:url";

const TYPES = { U8: [1, "getUint8"], I32: [4, "getInt32"], F32: [4, "getFloat32"], F16: [2, "getUint16"] };
const POLICIES = ["full", "recent", "h2o", "snapkv", "scored"];

/** Metadata and tensors, { name: { dtype, shape, data } }, row-major; F16 comes as its 16 bits. Throws what is wrong. */
export function readKvb(path) {
  const bytes = readFileSync(path);
  const start = 8 + Number(bytes.readBigUInt64LE(0));
  if (start > bytes.length) throw new Error("the header ends after the file");
  const { __metadata__: strings, ...entries } = JSON.parse(bytes.toString("utf8", 8, start));
  const metadata = JSON.parse(strings.kvcompile);
  if (metadata.format_version > 4) throw new Error(`format version ${metadata.format_version}, expected 1 to 4`);

  const zeroed = Buffer.from(bytes);
  zeroed.fill("0", zeroed.indexOf(metadata.checksum), zeroed.indexOf(metadata.checksum) + 64);
  if (createHash("sha256").update(zeroed).digest("hex") !== metadata.checksum) throw new Error("the file is damaged");

  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(entries)) {
    if (!(dtype in TYPES)) continue; // unknown tensors are ignored
    const [size, get] = TYPES[dtype];
    const view = new DataView(bytes.buffer, bytes.byteOffset + start + begin, end - begin);
    const data = Array.from({ length: (end - begin) / size }, (_, i) => view[get](i * size, true));
    tensors[name] = { dtype, shape, data };
  }
  return { metadata, tensors };
}

/** Every head's budget as [layer][place in storage order] = { head, policy, capacity, sink, recent, k_bits, v_bits }. */
export function plan({ metadata, tensors }) {
  const { num_layers: L, num_kv_heads: H } = metadata.model;
  const at = (name, l, h) => tensors[name].data[l * H + h];
  const names = ["capacity", "sink", "recent", "k_bits", "v_bits"];
  return Array.from({ length: L }, (_, l) =>
    Array.from({ length: H }, (_, place) => {
      const head = at("head_order", l, place);
      const policy = POLICIES[at("policy", l, head)];
      if (policy === undefined) throw new Error(`layer ${l}, head ${head}: an unknown policy`);
      return { head, policy, ...Object.fromEntries(names.map((name) => [name, at(name, l, head)])) };
    }),
  );
}

if (argv[1] && import.meta.url === pathToFileURL(argv[1]).href) {
  try {
    const artifact = readKvb(argv[2]);
    console.log(JSON.stringify({ metadata: artifact.metadata, plan: plan(artifact) }));
  } catch (error) {
    console.error(error.message);
    exit(2);
  }
}
