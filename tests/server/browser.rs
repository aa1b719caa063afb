//! The page / in a real browser, if there is one; `scripts/clients/browser` talks to the model there.

use super::{Site, engine};
use aoji::server::{Server, ServerOptions};
use axum::{Router, response::Html, routing::get};
use serde_json::json;
use std::process::Command;
use tokio::net::TcpListener;

/// What chromium makes of a page, after its scripts; `None` where there is no chromium.
async fn dump(url: String) -> Option<String> {
    let root = Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout == b"0\n");
    let profile = tempfile::tempdir().unwrap();
    let mut browser = Command::new("chromium");
    browser.args(["--headless", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]);
    browser.arg(format!("--user-data-dir={}", profile.path().display()));
    if root {
        browser.arg("--no-sandbox"); // root has no other
    }
    match tokio::task::spawn_blocking(move || browser.arg(url).output()).await.unwrap() {
        Ok(dump) => Some(String::from_utf8_lossy(&dump.stdout).into_owned()),
        Err(_) => {
            eprintln!("skipped: no command chromium");
            None
        }
    }
}

#[tokio::test]
async fn the_page_runs() {
    let site = Site::new().await;
    let Some(page) = dump(format!("http://{}/", site.address)).await else { return };
    // Its script asks for the model's name, within what its own security policy allows.
    assert!(page.contains("<span id=\"model\">demo</span>"), "{page}");
}

/// A conversation that the browser has kept is there again, its answer as Markdown, and nothing in it runs or is loaded.
#[tokio::test]
async fn answers_are_shown_and_never_run() {
    let answer = "# 제목\n\n**\"말\"**은 `x`\n\n```html\n<b onclick=\"run()\">굵게</b>\n```\n\n\
                  <img src=x onerror=\"document.title='run'\"> <script>document.title='run'</script>\n\n\
                  <iframe src=\"javascript:document.title='run'\"></iframe>\n\n\
                  [a](javascript:run) [b](https://example.org/) ![c](https://example.org/c.png)";
    let messages = json!([{"role": "user", "content": "<i>질문</i>"}, {"role": "assistant", "content": answer}]);
    let talk = json!({"id": "kept", "time": 1, "messages": messages}).to_string();
    // JSON twice is a literal of JavaScript; no tag in it ends the script.
    let literal = serde_json::to_string(&talk).unwrap().replace('<', "\\u003c");
    let kept = format!("<script>localStorage.setItem('aoji.talk.kept', {literal}); location = '/#kept';</script>");

    let server = Server::start(engine().clone(), ServerOptions::default()).unwrap();
    let router = Router::new().route("/kept", get(async || Html(kept))).fallback_service(server.router());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/kept", listener.local_addr().unwrap());
    tokio::spawn(async { axum::serve(listener, router).await });
    let Some(page) = dump(url).await else { return };
    for shown in [
        ">&lt;i&gt;질문&lt;/i&gt;</div>",
        "<h1>제목</h1>",
        "<strong>\"말\"</strong>은 <code>x</code>",
        "<figcaption><span>html</span><button type=\"button\" class=\"copy-code\">",
        "&lt;b onclick=\"run()\"&gt;굵게&lt;/b&gt;",
        "&lt;img src=x onerror=",
        "&lt;script&gt;document.title",
        "&lt;iframe src=",
        "<a target=\"_blank\" rel=\"noopener noreferrer\">a</a>",
        "<a href=\"https://example.org/\" target=\"_blank\" rel=\"noopener noreferrer\">b</a>",
        "<a href=\"https://example.org/c.png\" target=\"_blank\" rel=\"noopener noreferrer\">c</a>",
        "<title>aoji 아오지</title>",
    ] {
        assert!(page.contains(shown), "no {shown} in {page}");
    }
    assert!(!page.contains("<img") && !page.contains("<iframe"), "{page}");
}
