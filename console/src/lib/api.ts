/** The server's API as this page uses it. */

export type Model = { id: string; is_base: boolean; embeds_only: boolean; max_model_len: number };
export type Role = 'system' | 'user' | 'assistant';
export type Message = { role: Role; content: string };
export type Usage = { prompt_tokens: number; completion_tokens: number };
export type Needs = { cores?: number; memory_bytes?: number; accelerators?: number; ranks?: number };
export type Job = {
  id: string;
  name: string;
  state: string;
  stopping: boolean;
  waits_for: string | null;
  restarts: number;
  message: string | null;
  created: number;
  priority: number;
  project: string;
  needs: Needs;
  nodes: { node: string; ranks: number }[];
};
export type NodeJob = {
  id: string;
  name: string;
  cores_reserved: number;
  cores_used: number;
  memory_bytes_used: number;
};
export type Node = {
  id: string;
  state: string;
  mode: string;
  problem: string | null;
  cores: number;
  cores_used: number;
  memory_bytes: number;
  memory_bytes_used: number;
  accelerators: number;
  disk_free_bytes: number;
  jobs: NodeJob[];
};
export type Deployment = {
  id: string;
  replicas: number;
  min: number;
  max: number;
  live: string;
  canary: { source: string; percent: number } | null;
  message: string | null;
};
export type Replica = {
  id: string;
  model: string;
  version: string;
  url: string | null;
  state: string;
  in_flight: number;
  answered: number;
  failed: number;
};
export type Point = { step: number; loss: number; tokens_per_second: number | null };
export type Eval = { step: number; bits_per_byte: number };
export type Run = {
  id: string;
  steps_total: number | null;
  points: Point[];
  evals: Eval[];
  notes: string[];
  last: Point | null;
};

/** What the server said is wrong, or that there is no server. `status` is 0 without an answer. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

async function send(key: string, path: string, init: RequestInit = {}): Promise<Response> {
  let response: Response;
  try {
    const headers: Record<string, string> = { 'content-type': 'application/json' };
    // A server may be open on purpose: then there is no key to send.
    if (key) headers.authorization = `Bearer ${key}`;
    response = await fetch(path, { ...init, headers });
  } catch (error) {
    if (error instanceof DOMException && error.name === 'AbortError') throw error;
    throw new ApiError('The server cannot be reached. Is it running?', 0);
  }
  if (response.ok) return response;
  const body: unknown = await response.json().catch(() => null);
  throw new ApiError(errorText(body) ?? `The server answered with status ${response.status}.`, response.status);
}

function errorText(body: unknown): string | null {
  const error = (body as { error?: { message?: unknown } } | null)?.error;
  return typeof error?.message === 'string' ? error.message : null;
}

async function get<T>(key: string, path: string): Promise<T> {
  return (await send(key, path)).json() as Promise<T>;
}

const list = async <T>(key: string, path: string) => (await get<{ data: T[] }>(key, path)).data;

export const models = (key: string) => list<Model>(key, '/v1/models');
export const jobs = (key: string) => list<Job>(key, '/v1/jobs');
export const nodes = (key: string) => list<Node>(key, '/v1/nodes');
export const deployments = (key: string) => list<Deployment>(key, '/v1/deployments');
export const replicas = (key: string) => list<Replica>(key, '/v1/replicas');
export const order = (key: string, path: string, body: object) =>
  send(key, path, { method: 'POST', body: JSON.stringify(body) });
export const runs = (key: string) => list<{ id: string }>(key, '/v1/runs');

export async function run(key: string, name: string): Promise<Run> {
  const found = await get<Run>(key, `/v1/runs/${encodeURIComponent(name)}`);
  // A loss that is not a number comes as null; the curve has a gap there.
  return { ...found, points: found.points.filter((point) => point.loss !== null) };
}

/** What a stream tells piece by piece. */
export type Piece = { text: string; finish: string | null; usage: Usage | null };

type Chunk = {
  choices?: { text?: string; delta?: { content?: string }; finish_reason?: string | null }[];
  usage?: Usage | null;
};

/** Streams a completion of either kind; aborting `signal` ends it here and on the server. */
export async function* complete(
  key: string,
  path: '/v1/chat/completions' | '/v1/completions',
  request: object,
  signal: AbortSignal,
): AsyncGenerator<Piece> {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await send(key, path, { method: 'POST', body, signal });
  if (!response.body) throw new ApiError('The answer has no body.', response.status);
  for await (const data of events(response.body)) {
    if (data === '[DONE]') return;
    const chunk: Chunk = JSON.parse(data);
    const failure = errorText(chunk);
    if (failure) throw new ApiError(failure, response.status);
    const choice = chunk.choices?.[0];
    yield {
      text: choice?.delta?.content ?? choice?.text ?? '',
      finish: choice?.finish_reason ?? null,
      usage: chunk.usage ?? null,
    };
  }
  throw new ApiError('The connection broke before the answer was complete.', 0);
}

/** The data of server-sent events; comments are dropped. */
async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let pending = '';
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      pending += decoder.decode(value, { stream: true });
      const parts = pending.split('\n\n');
      pending = parts.pop() ?? '';
      for (const part of parts) if (part.startsWith('data: ')) yield part.slice(6);
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}
