// Drives the Supabase Storage stand-in with the app's own client, to prove that the stand-in behaves as
// that client expects. By hand, from an empty folder outside the repository:
//
//   npm install @supabase/storage-js
//   REPO=…; cargo build --release --manifest-path $REPO/Cargo.toml -p brightrun-worker --example supabase_stand_in
//   cp $REPO/tests/support/storage_js_check.mjs . && node storage_js_check.mjs $REPO/target/release/examples/supabase_stand_in

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { StorageClient } from "@supabase/storage-js";

const key = "sb_secret_fake";
const server = spawn(process.argv[2], [key], { stdio: ["pipe", "pipe", "inherit"] });
const [line] = await once(server.stdout, "data");
const url = line.toString().trim();
const connect = (key) => new StorageClient(`${url}/storage/v1`, { apikey: key, Authorization: `Bearer ${key}` });
const bucket = connect(key).from("lora-models");
const octets = { contentType: "application/octet-stream" };
const good = async (promise) => {
  const { data, error } = await promise;
  assert.equal(error, null);
  return data;
};
const bad = async (promise, words) => {
  const { data, error } = await promise;
  assert.equal(data, null);
  assert.match(`${error.statusCode} ${error.message}`, words);
};

const content = Buffer.from("adapter bytes");
const stored = await good(bucket.upload("user/artifact/a b.bin", content, octets));
assert.equal(stored.path, "user/artifact/a b.bin");
await bad(bucket.upload("user/artifact/a b.bin", content, octets), /409.*already exists/);
await good(bucket.upload("user/artifact/a b.bin", content, { ...octets, upsert: true }));
await good(bucket.update("user/artifact/a b.bin", content, octets));

const downloaded = await good(bucket.download("user/artifact/a b.bin"));
assert.equal(await downloaded.text(), "adapter bytes");
await bad(bucket.info("user/artifact/none"), /404.*not found/);
const info = await good(bucket.info("user/artifact/a b.bin"));
assert.equal(info.size, content.length);
assert.equal(info.contentType, "application/octet-stream");
assert.equal(await good(bucket.exists("user/artifact/a b.bin")), true);

const listed = await good(bucket.list("user/artifact"));
assert.deepEqual(listed.map((file) => [file.name, file.metadata.size]), [["a b.bin", content.length]]);
const folders = await good(bucket.list("user"));
assert.deepEqual(folders.map((folder) => [folder.name, folder.id]), [["artifact", null]]);

const read = async (address) => (await fetch(address)).text();
const { signedUrl } = await good(bucket.createSignedUrl("user/artifact/a b.bin", 3600));
assert.equal(await read(signedUrl), "adapter bytes");
const many = await good(bucket.createSignedUrls(["user/artifact/a b.bin", "none"], 3600));
assert.equal(await read(many[0].signedUrl), "adapter bytes");
assert.equal(many[1].signedUrl, null);
assert.ok(many[1].error);

const ticket = await good(bucket.createSignedUploadUrl("user/artifact/up.bin"));
await good(bucket.uploadToSignedUrl("user/artifact/up.bin", ticket.token, content, octets));
await bad(bucket.uploadToSignedUrl("user/artifact/up.bin", ticket.token, content, octets), /signature/i);
assert.equal(await (await good(bucket.download("user/artifact/up.bin"))).text(), "adapter bytes");

await good(bucket.copy("user/artifact/up.bin", "user/artifact/copy.bin"));
await good(bucket.move("user/artifact/up.bin", "user/artifact/moved.bin"));
const removed = await good(bucket.remove(["user/artifact/moved.bin", "user/artifact/copy.bin", "none"]));
assert.equal(removed.length, 2);
assert.deepEqual((await good(bucket.list("user/artifact"))).map((file) => file.name), ["a b.bin"]);

await bad(connect("wrong").from("lora-models").upload("x", content, octets), /403/);
await bad(connect(key).from("no-bucket").upload("x", content, octets), /404.*Bucket not found/);
await bad(bucket.upload("ü", content, octets), /400.*Invalid key/);

server.stdin.end();
await once(server, "exit");
console.log("the app's client and the stand-in agree");
