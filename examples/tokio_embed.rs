//! The engine in an asynchronous program: answers over HTTP, sent while they are generated.
//!
//! ```sh
//! cargo run --release --example tokio_embed -- 127.0.0.1:8080
//! curl -N --data "넌 누구니?" http://127.0.0.1:8080/ask
//! ```
//!
//! Calls of the engine block, so it works on a thread of its own and sends each piece through a channel. When the client has left,
//! `send` fails; the generation is then dropped, which cancels it.

use aoji::{Engine, Event, GenerateOptions, Message, Options};
use axum::{Router, body::Body, extract::State, routing::post};
use std::error::Error;
use tokio::{net::TcpListener, sync::mpsc, task::spawn_blocking};
use tokio_stream::wrappers::ReceiverStream;

type Sender = mpsc::Sender<aoji::Result<String>>;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8080".into());
    let engine = spawn_blocking(|| Engine::open("demo", &Options::default())).await??;
    let listener = TcpListener::bind(address).await?;
    println!("http://{}/ask", listener.local_addr()?);
    axum::serve(listener, Router::new().route("/ask", post(ask)).with_state(engine)).await?;
    Ok(())
}

async fn ask(State(engine): State<Engine>, question: String) -> Body {
    let (sender, receiver) = mpsc::channel(16);
    spawn_blocking(move || {
        if let Err(error) = answer(&engine, question, &sender) {
            let _ = sender.blocking_send(Err(error)); // ends the response before its end, which a client notices
        }
    });
    Body::from_stream(ReceiverStream::new(receiver))
}

fn answer(engine: &Engine, question: String, sender: &Sender) -> aoji::Result<()> {
    let prompt = engine.template().encode(engine.tokenizer()?, &[Message::new("user", question)], None)?;
    let mut session = engine.session(engine.max_context())?; // a real server keeps a few, and queues
    for event in session.generate(&prompt, &GenerateOptions::default())? {
        if let Event::Text(piece) = event?
            && sender.blocking_send(Ok(piece)).is_err()
        {
            break;
        }
    }
    Ok(())
}
