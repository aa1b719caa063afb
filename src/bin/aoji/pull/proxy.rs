//! For http:// servers, sends whole requests to the proxy, with the server's name in the first line (RFC 9112, section 3.2.2). ureq
//! would ask every proxy for a tunnel (CONNECT) instead, which many proxies refuse unless it leads to an https:// server.

use base64::{Engine, prelude::BASE64_STANDARD};
use std::fmt::Write;
use ureq::{
    Error, ProxyProtocol,
    unversioned::transport::{
        Buffers, ConnectionDetails, Connector, DefaultConnector, NextTimeout, RustlsConnector, TcpConnector, Transport,
    },
};

/// Connects as ureq does; but if there is a proxy and the server is an http:// one, it connects to the proxy itself.
#[derive(Debug)]
pub(super) struct ProxyConnector {
    to_server: DefaultConnector,
    to_proxy: Box<dyn Connector<(), Out = Box<dyn Transport>>>,
}

impl ProxyConnector {
    pub fn new() -> ProxyConnector {
        let to_proxy = Boxed(().chain(TcpConnector::default()).chain(RustlsConnector::default()));
        ProxyConnector { to_server: DefaultConnector::default(), to_proxy: Box::new(to_proxy) }
    }
}

impl Connector<()> for ProxyConnector {
    type Out = Box<dyn Transport>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<()>) -> Result<Option<Self::Out>, Error> {
        let asked = details.config.proxy().filter(|proxy| {
            let takes_requests = matches!(proxy.protocol(), ProxyProtocol::Http | ProxyProtocol::Https);
            takes_requests && !details.needs_tls() && !proxy.is_no_proxy(details.uri)
        });
        let (Some(proxy), Some(server)) = (asked, details.uri.authority()) else {
            return self.to_server.connect(details, chained);
        };
        let addrs = details.resolver.resolve(proxy.uri(), details.config, details.timeout)?;
        let details = ConnectionDetails {
            uri: proxy.uri(),
            addrs,
            config: details.config,
            request_level: details.request_level,
            resolver: details.resolver,
            now: details.now,
            timeout: details.timeout,
            current_time: details.current_time.clone(),
            run_connector: details.run_connector.clone(),
            register_shutdown: details.register_shutdown.clone(),
        };
        let Some(inner) = self.to_proxy.connect(&details, None)? else { return Ok(None) };
        let mut header = String::new();
        if proxy.username().is_some() || proxy.password().is_some() {
            let who = format!("{}:{}", proxy.username().unwrap_or_default(), proxy.password().unwrap_or_default());
            let _ = write!(header, "Proxy-Authorization: Basic {}\r\n", BASE64_STANDARD.encode(who));
        }
        Ok(Some(Box::new(ToProxy { inner, server: format!("http://{server}"), header })))
    }
}

/// A chain of connectors, with its type hidden.
#[derive(Debug)]
struct Boxed<C>(C);

impl<C: Connector<()>> Connector<()> for Boxed<C> {
    type Out = Box<dyn Transport>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<()>) -> Result<Option<Self::Out>, Error> {
        Ok(self.0.connect(details, chained)?.map(|transport| Box::new(transport) as Box<dyn Transport>))
    }
}

/// A connection to a proxy. Requests have no body, so everything that is sent is the head of a request.
#[derive(Debug)]
struct ToProxy {
    inner: Box<dyn Transport>,
    /// The server's address, which is put before the path of a request.
    server: String,
    /// The user's name and password for the proxy as a line of the head, or nothing.
    header: String,
}

impl Transport for ToProxy {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let head = &self.inner.buffers().output()[..amount];
        let after = |byte: u8| head.iter().position(|&b| b == byte).map(|i| i + 1);
        let (Some(path), Some(headers)) = (after(b' '), after(b'\n')) else {
            return Err(Error::BadUri(format!("no request: {}", String::from_utf8_lossy(head))));
        };
        let head =
            [&head[..path], self.server.as_bytes(), &head[path..headers], self.header.as_bytes(), &head[headers..]]
                .concat();
        let room = self.inner.buffers().output().len();
        for part in head.chunks(room) {
            self.inner.buffers().output()[..part.len()].copy_from_slice(part);
            self.inner.transmit_output(part.len(), timeout)?;
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.inner.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }
}
