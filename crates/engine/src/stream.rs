//! The channel from the engine's thread to one consumer, usable from threads and from async tasks.
//!
//! The sender never blocks and the channel needs no capacity check: a request gives at most
//! `max_tokens` + 2 events, so its queue is bounded by the request's own, validated length.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::request::{Event, FinishReason, Usage};

/// The events of one request. Dropping it cancels the request at the engine's next step.
#[derive(Debug)]
pub struct Stream {
    channel: Arc<Channel>,
}

/// The engine's end. Dropping it without a `Finished` event sends one that says the engine stopped.
#[derive(Debug)]
pub(crate) struct Sender {
    channel: Arc<Channel>,
}

#[derive(Debug, Default)]
struct Channel {
    queue: Mutex<Queue>,
    arrived: Condvar,
    /// The consumer is gone; nobody reads the queue any more.
    abandoned: AtomicBool,
    /// Prompt tokens found in the prefix cache, once the request runs.
    n_cached: AtomicUsize,
}

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Event>,
    /// `Finished` was pushed; nothing follows it.
    finished: bool,
    waker: Option<Waker>,
}

pub(crate) fn channel() -> (Sender, Stream) {
    let channel = Arc::new(Channel::default());
    let sender = Sender { channel: channel.clone() };
    (sender, Stream { channel })
}

impl Stream {
    /// The next event; blocks the calling thread. `None` after `Finished`.
    pub fn recv(&mut self) -> Option<Event> {
        let mut queue = self.channel.lock();
        loop {
            if let Some(event) = queue.events.pop_front() {
                return Some(event);
            }
            if queue.finished {
                return None;
            }
            let arrived = self.channel.arrived.wait(queue);
            queue = arrived.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Prompt tokens that came from the prefix cache, for a consumer that does not wait for `Finished`. Known with the
    /// first token.
    pub fn cached_tokens(&self) -> usize {
        self.channel.n_cached.load(Ordering::Acquire)
    }

    /// The next event for an async task. `None` after `Finished`. Cancel safe.
    pub async fn next(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// The shape `futures::Stream` wants, without depending on it.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let mut queue = self.channel.lock();
        if let Some(event) = queue.events.pop_front() {
            return Poll::Ready(Some(event));
        }
        if queue.finished {
            return Poll::Ready(None);
        }
        queue.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.channel.abandoned.store(true, Ordering::Release);
    }
}

impl Sender {
    /// Never blocks.
    pub(crate) fn send(&self, event: Event) {
        let mut queue = self.channel.lock();
        assert!(!queue.finished, "an event after the last one");
        queue.finished = matches!(event, Event::Finished { .. });
        queue.events.push_back(event);
        let waker = queue.waker.take();
        drop(queue);
        self.channel.arrived.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Tells the consumer how much of the prompt was cached.
    pub(crate) fn set_cached(&self, n_cached: usize) {
        self.channel.n_cached.store(n_cached, Ordering::Release);
    }

    /// The consumer has gone away.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.channel.abandoned.load(Ordering::Acquire)
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let finished = self.channel.lock().finished;
        if !finished {
            self.send(Event::Finished {
                reason: FinishReason::Error("the engine stopped".into()),
                usage: Usage::default(),
            });
        }
    }
}

impl Channel {
    /// The queue is valid between any two statements, so a panic elsewhere does not spoil it.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Wake;

    fn token(id: u32) -> Event {
        Event::Token { id, logprobs: None }
    }

    #[test]
    fn events_cross_threads_in_order_and_end() {
        let (sender, mut stream) = channel();
        let producer = std::thread::spawn(move || (0..100).for_each(|id| sender.send(token(id))));
        for id in 0..100 {
            assert_eq!(stream.recv(), Some(token(id)));
        }
        producer.join().unwrap();
        // The sender was dropped without a last event.
        assert!(matches!(stream.recv(), Some(Event::Finished { reason: FinishReason::Error(_), .. })));
        assert_eq!(stream.recv(), None);
    }

    #[derive(Default)]
    struct CountWakes(AtomicUsize);
    impl Wake for CountWakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn an_async_consumer_is_woken_once_per_wait() {
        let (sender, mut stream) = channel();
        let wakes = Arc::new(CountWakes::default());
        let waker = Waker::from(wakes.clone());
        let mut context = Context::from_waker(&waker);
        assert!(stream.poll_next(&mut context).is_pending());
        sender.send(token(1));
        sender.send(token(2));
        assert_eq!(wakes.0.load(Ordering::SeqCst), 1);
        assert_eq!(stream.poll_next(&mut context), Poll::Ready(Some(token(1))));
        assert_eq!(stream.poll_next(&mut context), Poll::Ready(Some(token(2))));
        assert!(stream.poll_next(&mut context).is_pending());
    }

    #[test]
    fn dropping_the_stream_is_seen_by_the_sender() {
        let (sender, stream) = channel();
        assert!(!sender.is_abandoned());
        drop(stream);
        assert!(sender.is_abandoned());
    }
}
