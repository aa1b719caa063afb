//! Accepts connections, and ends them in order.

use super::state::Server;
use axum::serve::Listener;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use std::{pin::pin, time::Duration};

/// The longest that a client may take to send a request's head.
const HEAD_SECONDS: u64 = 30;
/// How long clients may still be told that their answers were ended.
const LAST_WORDS: Duration = Duration::from_secs(2);

impl Server {
    /// Answers on `listener` until `shutdown` is ready. Then it takes no more connections, gives the requests that it
    /// has the time `drain` to finish, and ends the rest with an error. `true` when all were finished.
    pub async fn serve<L: Listener>(
        &self,
        mut listener: L,
        shutdown: impl Future<Output = ()>,
        drain: Duration,
    ) -> bool {
        let router = self.router();
        let connections = GracefulShutdown::new();
        let mut shutdown = pin!(shutdown);
        loop {
            let (io, _) = tokio::select! {
                connection = listener.accept() => connection,
                () = &mut shutdown => break,
            };
            let service = TowerToHyperService::new(router.clone());
            let mut builder = http1::Builder::new();
            // A client that never finishes sending its head would otherwise hold a connection for ever.
            builder.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(HEAD_SECONDS));
            let connection = connections.watch(builder.serve_connection(TokioIo::new(io), service));
            tokio::spawn(async move {
                if let Err(e) = connection.await {
                    tracing::debug!("a connection ended: {e}");
                }
            });
        }
        drop(listener);
        self.drain();
        let mut ended = pin!(connections.shutdown());
        if tokio::time::timeout(drain, &mut ended).await.is_ok() {
            return true;
        }
        self.stop();
        let _ = tokio::time::timeout(LAST_WORDS, ended).await; // a client that does not read is cut off
        false
    }
}
