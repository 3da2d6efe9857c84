/** What this browser remembers: the key, the look, and how to generate. */

export type Theme = 'auto' | 'light' | 'dark';
const STORED = 'loquat';

const defaults = {
  key: '',
  theme: 'auto' as Theme,
  model: '',
  // Small models wander at the usual 0.7 or 1.
  temperature: 0.3,
  maxTokens: 512,
  system: '',
};

function load(): typeof defaults {
  try {
    return { ...defaults, ...JSON.parse(localStorage.getItem(STORED) ?? '{}') };
  } catch {
    // Storage that is switched off or damaged costs the memory, not the page.
    return { ...defaults };
  }
}

export const settings = $state(load());

/** Takes a key out of the address (`#key=…`), once: it is not left in the history. */
export function takeKeyFromAddress() {
  const key = new URLSearchParams(location.hash.slice(1)).get('key');
  if (!key) return;
  settings.key = key;
  history.replaceState(null, '', location.pathname + location.search);
}

/** Keeps storage and the page's look in step with the settings. Call it inside an effect. */
export function applySettings() {
  const { theme } = settings;
  if (theme === 'auto') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem(STORED, JSON.stringify(settings));
  } catch {
    // As above.
  }
}
