//! The examples run and do what they say. `cargo test` builds them; with `--test cli` alone they may be missing or old.

use super::{Run, feed, short};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
};

fn example(name: &str) -> Option<Command> {
    let path = Path::new(env!("CARGO_BIN_EXE_aoji")).parent().unwrap().join("examples").join(name);
    if !path.is_file() {
        println!("skipped: no {} (cargo build --examples)", path.display());
        return None;
    }
    let mut command = Command::new(path);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Some(command)
}

fn run(name: &str, args: &[&str], stdin: &str) -> Option<String> {
    let mut command = example(name)?;
    command.args(args);
    Some(Run::ok(feed(command, stdin.as_bytes())))
}

#[test]
fn an_answer() {
    let (question, answer) = short(20);
    let Some(text) = run("generate", &[&question], "") else { return };
    assert!(text.starts_with(&answer) && text.contains("tokens/s"), "{text}");
}

#[test]
fn a_conversation_reuses_what_it_has_computed() {
    let (question, answer) = short(20);
    let Some(text) = run("chat", &[], &format!("{question}\n{question}\n\nnever asked\n")) else { return };
    assert!(text.starts_with(&format!("{answer}\n[0 of ")), "{text}");
    let reused: Vec<&str> = text.lines().filter(|line| line.ends_with(" tokens reused]")).collect();
    assert!(reused.len() == 2 && !reused[1].starts_with("[0 of"), "{text}");
}

#[test]
fn a_choice_of_its_own() {
    let (question, answer) = short(20);
    let Some(text) = run("custom_sampler", &[&question], "") else { return };
    assert_eq!(text, format!("{answer}\n[wavered 0 times]\n"));
    let wavering = run("custom_sampler", &[], "").unwrap();
    assert!(!wavering.contains("wavered 0"), "{wavering}");
}

#[test]
fn answers_in_order() {
    let Some(text) = run("batch_score", &[], "") else { return };
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.len() == 4 && lines[0].contains("파리") && lines[1].contains("런던"), "{text}");
}

/// A running server; it is killed when this is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_answer_over_http() {
    let Some(mut command) = example("tokio_embed") else { return };
    let mut server = Server(command.arg("127.0.0.1:0").spawn().unwrap());
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("http://").and_then(|rest| rest.strip_suffix("/ask")).expect("an address");
    let (question, answer) = short(20);
    let mut stream = TcpStream::connect(address).unwrap();
    let head = "POST /ask HTTP/1.0\r\nContent-Type: text/plain\r\nContent-Length:";
    write!(stream, "{head} {}\r\n\r\n{question}", question.len()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    assert!(response.starts_with("HTTP/1.0 200 OK") && response.ends_with(&answer), "{response}");
}
