// The console in a real browser against a running server.
//
// LOQUAT_URL (http://127.0.0.1:8080), LOQUAT_KEY, LOQUAT_CHAT_MODEL, LOQUAT_BASE_MODEL, CHROMIUM (/usr/bin/chromium),
// SCREENSHOTS (a directory; none are written without it). Needs `npm ci` in console/.
import assert from 'node:assert/strict';
import { mkdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { join } from 'node:path';

const { chromium } = createRequire(new URL('../console/package.json', import.meta.url))('playwright-core');
const env = (name, otherwise) => process.env[name] || otherwise;
const url = env('LOQUAT_URL', 'http://127.0.0.1:8080').replace(/\/v1\/?$/, '');
const key = env('LOQUAT_KEY', '');
const chatModel = env('LOQUAT_CHAT_MODEL', 'chat');
const baseModel = env('LOQUAT_BASE_MODEL', 'base');
const shots = env('SCREENSHOTS', '');
const PATIENCE_MS = 60_000;
assert(key, 'LOQUAT_KEY is not set');
if (shots) mkdirSync(shots, { recursive: true });

const browser = await chromium.launch({
  executablePath: env('CHROMIUM', '/usr/bin/chromium'),
  args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
    '--disable-background-networking', '--disable-component-update'],
});

const strangers = [];
const complaints = [];

async function open(options = {}, path = `/#key=${key}`) {
  const page = await browser.newPage({ viewport: { width: 1280, height: 800 }, ...options });
  page.setDefaultTimeout(PATIENCE_MS);
  page.on('request', (request) => {
    if (!request.url().startsWith(url) && !request.url().startsWith('data:')) strangers.push(request.url());
  });
  page.on('console', (message) => message.type() === 'error' && complaints.push(message.text()));
  page.on('pageerror', (error) => complaints.push(String(error)));
  await page.goto(url + path);
  return page;
}

const shot = (page, name) => (shots ? page.screenshot({ path: join(shots, `${name}.png`) }) : undefined);
const choose = (page, model) => page.getByLabel('Model', { exact: true }).selectOption(model);
const idle = (page) => page.locator('[role=log][aria-busy=false]').waitFor();

const steps = {
  async 'a key from the address is taken once and remembered'() {
    const page = await open();
    await page.getByLabel('Model', { exact: true }).waitFor();
    assert.equal(new URL(page.url()).hash, '');
    await page.reload();
    await page.getByLabel('Model', { exact: true }).waitFor();
    await page.close();
  },
  async 'a wrong key is asked for again'() {
    const page = await open({}, '/#key=sk-wrong');
    await page.getByRole('alert').waitFor();
    await shot(page, 'key');
    await page.getByLabel('API key').fill(key);
    await page.keyboard.press('Enter');
    await page.getByLabel('Model', { exact: true }).waitFor();
    await page.close();
    complaints.length = 0; // Chromium reports the 401 itself.
  },
  async 'a chat streams its answer'() {
    const page = await open();
    await choose(page, chatModel);
    await page.getByLabel('Message').fill('What is the capital of France? Answer with two short sentences.');
    await page.keyboard.press('Enter');
    await page.locator('.turn.assistant .note').waitFor();
    assert((await page.locator('.turn.assistant .prose').innerText()).trim().length > 0);
    assert.match(await page.locator('.note').innerText(), /\d+ tokens?/);
    await shot(page, 'chat-light');
    await page.getByRole('button', { name: 'Clear' }).click();
    assert.equal(await page.locator('.turn').count(), 0);
    await page.close();
  },
  async 'Escape and the button stop an answer'() {
    const page = await open();
    await choose(page, chatModel);
    for (const stop of [() => page.keyboard.press('Escape'), () => page.getByRole('button', { name: 'Stop' }).click()]) {
      await page.getByLabel('Message').fill('Tell me a very long story about the sea.');
      await page.getByLabel('Message').press('Enter');
      await page.waitForFunction(() => document.querySelector('.running .prose')?.textContent?.trim());
      await stop();
      await idle(page);
    }
    assert.match(await page.locator('.note').last().innerText(), /stopped/);
    assert(await page.getByLabel('Message').evaluate((node) => node === document.activeElement));
    await page.close();
  },
  async 'Shift Enter breaks the line'() {
    const page = await open();
    await choose(page, chatModel);
    await page.getByLabel('Message').press('a');
    await page.keyboard.press('Shift+Enter');
    await page.keyboard.press('b');
    assert.equal(await page.getByLabel('Message').inputValue(), 'a\nb');
    await page.close();
  },
  async 'a base model continues a text'() {
    const page = await open();
    await choose(page, baseModel);
    await page.getByLabel('Beginning of a text').fill('My fellow Americans');
    await page.getByRole('button', { name: 'Settings' }).click();
    await page.getByLabel('Longest answer').fill('60');
    await page.getByRole('button', { name: 'Settings' }).click();
    await page.getByRole('button', { name: 'Continue the text' }).click();
    await page.locator('.page .note').waitFor();
    assert((await page.locator('.continued').innerText()).length > 10);
    await shot(page, 'continue-light');
    await page.close();
  },
  async 'the curve is drawn'() {
    const page = await open();
    await page.locator('.curve .trend').waitFor({ state: 'attached' });
    assert((await page.locator('.curve .trend').getAttribute('d')).length > 10);
    assert((await page.locator('.curve .eval').count()) > 0);
    await page.locator('.curve svg').hover();
    assert.match(await page.locator('figcaption').innerText(), /step \d+: loss/);
    await page.close();
  },
  async 'the cluster is shown and steered'() {
    const page = await open();
    await page.getByRole('button', { name: 'Cluster' }).click();
    const node = page.locator('section.node').first();
    await node.getByRole('img', { name: /^Cores: .* of .* in use$/ }).waitFor();
    await node.getByRole('img', { name: /^Memory: .* of .* in use$/ }).waitFor();
    assert.match(await node.innerText(), /cores reserved/);
    await node.getByRole('button', { name: 'cordon' }).click();
    await node.locator('.state.cordoned').waitFor();
    await shot(page, 'cluster-nodes');
    // With every node closed a job waits, and says why.
    const tell = (path, body) =>
      page.request.post(url + path, { data: body, headers: { authorization: `Bearer ${key}` } });
    const name = `waits-${Date.now()}`;
    assert.equal((await tell('/v1/jobs', { name, args: ['doctor'], needs: { cores: 1 } })).status(), 200);
    await page.getByRole('tab', { name: 'Jobs' }).click();
    const job = page.locator('.queue li', { hasText: name });
    await job.locator('.reason', { hasText: 'no node is open' }).waitFor();
    await shot(page, 'cluster-jobs');
    await job.getByRole('button', { name: `Cancel ${name}` }).click();
    await job.locator('.state.cancelled').waitFor();
    await page.getByRole('tab', { name: 'Nodes' }).click();
    await node.getByRole('button', { name: 'uncordon' }).click();
    await node.locator('.state.open').waitFor();
    // A deployment of an engine that is not there, with a canary that is rolled back.
    const model = `m${Date.now()}`;
    const ask = { source: 'http://127.0.0.1:9', replicas: 0 };
    assert.equal((await tell(`/v1/deployments/${model}`, ask)).status(), 200);
    const trial = { source: 'http://127.0.0.1:8', percent: 10 };
    assert.equal((await tell(`/v1/deployments/${model}/canary`, trial)).status(), 200);
    await page.getByRole('tab', { name: 'Deployments' }).click();
    const deployment = page.locator('section.node', { hasText: model });
    await deployment.getByText('10 % of the requests to').waitFor();
    await shot(page, 'cluster-deployments');
    await deployment.getByRole('button', { name: 'roll back' }).click();
    await deployment.getByText('was rolled back by hand').waitFor();
    await page.request.delete(`${url}/v1/deployments/${model}`, { headers: { authorization: `Bearer ${key}` } });
    await deployment.waitFor({ state: 'detached' });
    await page.close();
  },
  async 'a refused order is shown'() {
    const page = await open();
    await page.route('**/v1/nodes/*/cordon', (route) =>
      route.fulfill({ status: 403, contentType: 'application/json', body: '{"error":{"message":"This key may not."}}' }));
    await page.getByRole('button', { name: 'Cluster' }).click();
    await page.locator('section.node').first().getByRole('button', { name: 'cordon' }).click();
    await page.getByRole('alert').getByText('This key may not.').waitFor();
    await page.close();
    complaints.length = 0; // Chromium reports the 403 itself.
  },
  async 'errors are shown'() {
    const page = await open();
    await choose(page, chatModel);
    await page.getByRole('button', { name: 'Settings' }).click();
    await page.getByLabel('Longest answer').fill('100000000');
    await page.getByLabel('Message').fill('hello');
    await page.getByRole('button', { name: 'Send' }).click();
    await page.locator('.turn .error').waitFor();
    await shot(page, 'settings-error');
    await page.close();
    complaints.length = 0; // Chromium reports the 400 itself.
  },
  async 'dark'() {
    const page = await open({ colorScheme: 'dark' });
    await choose(page, chatModel);
    const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const dark = await ground();
    await page.getByLabel('Message').fill('Write a haiku about rain.');
    await page.keyboard.press('Enter');
    await page.locator('.turn.assistant .note').waitFor();
    await shot(page, 'chat-dark');
    await page.getByRole('button', { name: 'Switch between' }).click();
    assert.notEqual(await ground(), dark);
    await page.close();
  },
  async '360 pixels are enough'() {
    for (const colorScheme of ['light', 'dark']) {
      const page = await open({ viewport: { width: 360, height: 720 }, colorScheme });
      await choose(page, chatModel);
      await page.getByLabel('Message').fill('Name three fruits as a list.');
      await page.getByRole('button', { name: 'Send' }).click();
      await page.locator('.turn.assistant .note').waitFor();
      await shot(page, `narrow-${colorScheme}`);
      for (const panel of ['Training', 'Cluster', 'Settings']) {
        await page.getByRole('button', { name: panel, exact: true }).click();
        const wide = await page.evaluate(() => document.documentElement.scrollWidth);
        assert(wide <= 360, `${panel}: ${wide} px`);
        await shot(page, `narrow-${colorScheme}-${panel.toLowerCase()}`);
      }
      await page.close();
    }
  },
  async 'the keyboard reaches everything and shows where it is'() {
    const page = await open();
    await choose(page, chatModel);
    await page.locator('body').click({ position: { x: 5, y: 400 } });
    const reached = new Set();
    for (let i = 0; i < 16; i++) {
      await page.keyboard.press('Tab');
      const seen = await page.evaluate(() => {
        const node = document.activeElement;
        const shown = getComputedStyle(node).outlineStyle !== 'none' || node.closest('.composer:focus-within') !== null;
        return { name: node.getAttribute('aria-label') ?? node.textContent?.trim(), shown, body: node === document.body };
      });
      if (seen.body) continue;
      assert(seen.shown, `no focus to be seen on ${seen.name}`);
      reached.add(seen.name);
    }
    for (const name of ['Model', 'Settings', 'Message']) assert(reached.has(name), `${name} not among ${[...reached]}`);
    await page.close();
  },
};

let failed = 0;
for (const [name, step] of Object.entries(steps)) {
  try {
    await step();
    assert.deepEqual(strangers, [], 'requests to other servers');
    assert.deepEqual(complaints, [], 'complaints in the console');
    console.log(`ok: ${name}`);
  } catch (error) {
    failed += 1;
    complaints.length = 0;
    console.log(`FAILED: ${name}\n${error.stack}`);
  }
}
await browser.close();
console.log(`${Object.keys(steps).length - failed} of ${Object.keys(steps).length} passed`);
process.exit(failed ? 1 : 0);
