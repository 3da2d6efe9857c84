//! The HTTP server of this process: bound, running on threads of its own, closed in order.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use api::{AppState, ServerTls};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::args::Listen;

/// Threads that answer HTTP. They only parse and wait: two are enough to keep probes answered beside inference.
const HTTP_THREADS: usize = 2;

pub(crate) struct Http {
    pub(crate) address: SocketAddr,
    /// Of its address: https where it speaks TLS.
    pub(crate) scheme: &'static str,
    runtime: Runtime,
    server: JoinHandle<std::io::Result<()>>,
    close: watch::Sender<bool>,
}

impl Http {
    /// Binds the address and serves `state` from now on.
    pub(crate) fn start(state: &AppState, listen: &Listen) -> Result<Http> {
        raise_file_limit();
        let files = listen.tls_cert.as_ref().zip(listen.tls_key.as_ref());
        let tls = files.map(|(cert, key)| ServerTls::open(cert, key, crate::now_unix_s())).transpose()?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(HTTP_THREADS)
            .enable_all()
            .build()
            .context("cannot start the HTTP threads")?;
        let wanted = format!("{}:{}", listen.host, listen.port);
        let listener = runtime.block_on(TcpListener::bind(&wanted)).with_context(|| {
            format!("cannot listen on {wanted} (is another server there? --port picks another)")
        })?;
        let address = listener.local_addr()?;
        let (close, mut closed) = watch::channel(false);
        let shutdown = async move {
            // The sender lives as long as the server; its end means the same as its word.
            let _ = closed.wait_for(|closed| *closed).await;
        };
        let server = runtime.spawn(api::serve_tls(listener, tls, state.clone(), shutdown));
        Ok(Http { address, scheme, runtime, server, close })
    }

    /// Where it is.
    pub(crate) fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    /// Refuses new requests from now on; running ones go on.
    pub(crate) fn close(&self) {
        self.close.send_replace(true);
    }

    /// Waits until the running answers are sent.
    pub(crate) fn join(self) -> Result<()> {
        self.close();
        self.runtime.block_on(self.server).context("the HTTP server panicked")??;
        Ok(())
    }
}

/// Each connection is an open file; shells allow 1,024 where the system would allow many more.
fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
