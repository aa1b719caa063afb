//! Keeps the C functions of dependencies to the library itself: libaoji.so exports what aoji.h declares.
fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo:rustc-link-arg-cdylib=-Wl,--exclude-libs,ALL");
    }
}
