//! The page / in a real browser, where there is one; `scripts/clients/browser` talks to the model there.

use super::Site;
use std::process::Command;

#[tokio::test]
async fn the_page_runs() {
    let root = Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout == b"0\n");
    let profile = tempfile::tempdir().unwrap();
    let mut browser = Command::new("chromium");
    browser.args(["--headless", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]);
    browser.arg(format!("--user-data-dir={}", profile.path().display()));
    if root {
        browser.arg("--no-sandbox"); // root has no other
    }
    let site = Site::new().await;
    let url = format!("http://{}/", site.address);
    let dump = tokio::task::spawn_blocking(move || browser.arg(url).output()).await.unwrap();
    let Ok(dump) = dump else {
        eprintln!("skipped: no command chromium");
        return;
    };
    let page = String::from_utf8_lossy(&dump.stdout);
    // Its script asks for the model's name, within what its own security policy allows.
    assert!(page.contains("<span id=\"model\">demo</span>"), "{page}\n{}", String::from_utf8_lossy(&dump.stderr));
}
