//! Which PTX the machine code of an architecture is made from: for the build script, and for the tests that run or read it.

/// The architecture of the PTX that the machine code of an image (`86`) is made from, or that the image is (`ptx86`). The later
/// GPUs of Ampere and Ada have nothing that the kernels use and the first has not, Blackwell nothing beyond Hopper, and one run of
/// the compiler's first half, which takes most of the time, serves them all.
pub fn of_ptx(image: &str) -> &str {
    match image {
        "86" | "89" => "80",
        "100" | "120" => "90",
        _ => image.trim_start_matches("ptx"),
    }
}
