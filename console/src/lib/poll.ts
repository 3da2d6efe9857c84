const POLL_MS = 2000;

/** Refreshes now and every two seconds while the page is seen, one after another. Returns what ends it. */
export function poll(refresh: () => Promise<void>): () => void {
  let over = false;
  let timer: ReturnType<typeof setTimeout>;
  const turn = async () => {
    if (!document.hidden) await refresh();
    if (!over) timer = setTimeout(turn, POLL_MS);
  };
  turn();
  return () => {
    over = true;
    clearTimeout(timer);
  };
}
