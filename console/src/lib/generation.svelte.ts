/** One running generation: text that grows, a way to stop it, and how it ended. */

import * as api from './api';
import { settings } from './settings.svelte';

export class Generation {
  text = $state('');
  running = $state(false);
  error = $state('');
  /** "12 tokens · 30.1/s" once it is over. */
  note = $state('');
  #abort: AbortController | null = null;

  /** Runs until the end, a failure or `stop`; never throws. */
  async start(path: '/v1/chat/completions' | '/v1/completions', request: object): Promise<void> {
    const abort = (this.#abort = new AbortController());
    Object.assign(this, { text: '', error: '', note: '', running: true });
    let firstAt = 0;
    let ended = 'stopped';
    try {
      const options = { temperature: settings.temperature, max_tokens: settings.maxTokens };
      for await (const piece of api.complete(settings.key, path, { ...options, ...request }, abort.signal)) {
        firstAt ||= performance.now();
        this.text += piece.text;
        if (piece.finish) ended = piece.finish === 'length' ? 'cut at the longest answer' : '';
        if (piece.usage) this.note = summary(piece.usage, performance.now() - firstAt);
      }
    } catch (failure) {
      ended = abort.signal.aborted ? 'stopped' : '';
      if (!abort.signal.aborted) this.error = (failure as Error).message;
    }
    this.note = [this.note, ended].filter(Boolean).join(' · ');
    this.running = false;
  }

  stop() {
    this.#abort?.abort();
  }
}

function summary({ completion_tokens }: api.Usage, ms: number): string {
  const speed = completion_tokens > 1 && ms > 0 ? ` · ${(((completion_tokens - 1) * 1000) / ms).toFixed(1)}/s` : '';
  return `${completion_tokens} ${completion_tokens === 1 ? 'token' : 'tokens'}${speed}`;
}
