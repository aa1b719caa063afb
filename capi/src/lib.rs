//! The C interface. cbindgen makes `include/aoji.h` from these files, so the comments here are the header's documentation.
//!
//! It is a thin layer: it uses only the public library. A panic never crosses into C (`guard`); NULL and text that is not UTF-8 are
//! errors; a session that is already in use refuses a second call.
//!
//! Every function has the same safety contract, that of the header: a pointer is NULL or points to as many valid elements as the
//! function says, and a handle was made by this library and is not freed. Each `SAFETY` comment names the part it relies on.
#![allow(non_camel_case_types)] // C's names, the same on both sides
#![deny(missing_docs)]
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod engine;
mod event;
mod session;
mod stream;

use aoji::{Error, Result};
use std::{
    any::Any,
    cell::RefCell,
    ffi::{CStr, CString, c_char},
    mem::MaybeUninit,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::NonNull,
    slice,
};

/// Result of a call. More may be added.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum aoji_status {
    /// Success.
    Ok = 0,
    /// A callback ended the call.
    Cancelled = 1,
    /// The buffer is too small; the needed size was written. Asking with capacity 0 and NULL is allowed.
    Buffer = 2,
    /// An argument is NULL, out of range, or not UTF-8.
    Input = 3,
    /// The tokens do not fit the context.
    Context = 4,
    /// There is no such model.
    NoModel = 5,
    /// A file is missing, unreadable, or not what it should be.
    File = 6,
    /// A model of a kind that aoji does not run.
    Unsupported = 7,
    /// Weights or KV cache do not fit the memory of the device.
    Memory = 8,
    /// The GPU cannot be used.
    NoGpu = 9,
    /// The GPU or its driver failed.
    Cuda = 10,
    /// A bug of the library. The session in which it happened returns only this from then on and can only be freed.
    Internal = 11,
}

/// The status and message of a call that failed.
struct Failure {
    status: aoji_status,
    text: String,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let status = match error {
            Error::Input(_) => aoji_status::Input,
            Error::Context { .. } => aoji_status::Context,
            Error::NoModel { .. } => aoji_status::NoModel,
            Error::Io { .. } | Error::File { .. } | Error::Tensor { .. } => aoji_status::File,
            Error::Unsupported { .. } => aoji_status::Unsupported,
            Error::Memory(_) => aoji_status::Memory,
            Error::NoGpu(_) => aoji_status::NoGpu,
            Error::Cuda { .. } => aoji_status::Cuda,
            _ => aoji_status::Internal,
        };
        Failure { status, text: error.to_string() }
    }
}

type Outcome<T = ()> = std::result::Result<T, Failure>;

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Version of the library.
#[unsafe(no_mangle)]
pub extern "C" fn aoji_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => panic!("a version without NUL"),
    };
    VERSION.as_ptr()
}

/// What was wrong with the last call of this thread that did not return AOJI_STATUS_OK, where, and what was expected;
/// empty if there was none. Valid until the next such call of this thread.
#[unsafe(no_mangle)]
pub extern "C" fn aoji_last_error() -> *const c_char {
    // a thread that is ending may have lost its text already
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// Runs the body of a C function: its failure, or its panic, becomes a status and this thread's last error.
fn guard(body: impl FnOnce() -> Outcome) -> aoji_status {
    // Unwind safety: an engine is immutable, and `aoji_session` refuses to go on after a panic.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return aoji_status::Ok,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure { status: aoji_status::Internal, text: format!("bug in aoji: {}", panic_text(&*panic)) },
    };
    let text = CString::new(failure.text.replace('\0', "\u{FFFD}")).unwrap_or_default();
    let _ = LAST.try_with(|last| last.replace(text));
    failure.status
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without text")
}

fn wrong(what: String) -> Error {
    Error::Input(what)
}

/// A pointer that must not be NULL.
fn given<T>(name: &str, pointer: *mut T) -> Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(|| wrong(format!("{name} is NULL")))
}

/// The text of an argument that ends with NUL.
///
/// # Safety
/// `pointer` is NULL or points to bytes that end with NUL and stay as they are for `'a`.
unsafe fn text<'a>(name: &str, pointer: *const c_char) -> Result<&'a str> {
    let pointer = given(name, pointer.cast_mut())?;
    // SAFETY: not NULL, so it points to bytes that end with NUL.
    let bytes = unsafe { CStr::from_ptr(pointer.as_ptr()) };
    bytes.to_str().map_err(|e| wrong(format!("{name}: byte {} is not UTF-8 text", e.valid_up_to())))
}

/// The elements of an argument; NULL means none.
///
/// # Safety
/// `pointer` is NULL or points to `count` valid elements that stay as they are for `'a`.
unsafe fn elements<'a, T>(name: &str, pointer: *const T, count: usize) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    let pointer = given(name, pointer.cast_mut())?;
    if !pointer.is_aligned() || count.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(wrong(format!("{name}: {count} elements cannot be at {pointer:p}")));
    }
    // SAFETY: not NULL, so `count` valid elements; aligned and in range as was checked.
    Ok(unsafe { slice::from_raw_parts(pointer.as_ptr(), count) })
}

/// The options of a call: NULL, or a structure that begins with its own size, and that may be of another version of the
/// header. Fields that an older version does not have are zero; fields of a newer version that are unknown here must be
/// zero.
///
/// # Safety
/// `T` is a structure of C that begins with a `usize` and in which all bytes may be zero. `pointer` is NULL or points to as many
/// bytes as that number says.
unsafe fn options<T>(pointer: *const T) -> Result<T> {
    let mut options = MaybeUninit::<T>::zeroed();
    if let Some(pointer) = NonNull::new(pointer.cast_mut()) {
        let bytes = pointer.cast::<u8>();
        // SAFETY: the structure begins with its size.
        let size = unsafe { pointer.cast::<usize>().read_unaligned() };
        let known = size.min(size_of::<T>());
        if size < size_of::<usize>() || size > 1 << 16 {
            let expected = size_of::<T>();
            return Err(wrong(format!("options: size is {size}, expected sizeof the structure, {expected}")));
        }
        // SAFETY: `size` bytes can be read, those after `known` too.
        let more = unsafe { slice::from_raw_parts(bytes.add(known).as_ptr(), size - known) };
        if more.iter().any(|byte| *byte != 0) {
            return Err(wrong(
                "options: they come from a newer header than this library's, and use fields that are new there".into(),
            ));
        }
        // SAFETY: `known` bytes can be read, and `options` has at least as many.
        unsafe { options.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), known) };
    }
    // SAFETY: zeros are valid for `T`, and what was copied over them is a prefix of a valid `T`.
    Ok(unsafe { options.assume_init() })
}

/// Writes `values` to a caller's buffer, and their number to `count`.
///
/// # Safety
/// `buffer` is NULL or has room for `capacity` elements; `count` is NULL or valid.
unsafe fn fill<T: Copy>(name: &str, values: &[T], buffer: *mut T, capacity: usize, count: *mut usize) -> Outcome {
    let count = given("count", count)?;
    // SAFETY: not NULL, so valid.
    unsafe { count.write(values.len()) };
    room(name, values.len(), capacity)?;
    if !values.is_empty() {
        let buffer = given(name, buffer)?;
        // SAFETY: the buffer has room for `capacity` elements, and there are no more; the library's own are elsewhere.
        unsafe { buffer.as_ptr().copy_from_nonoverlapping(values.as_ptr(), values.len()) };
    }
    Ok(())
}

fn room(name: &str, needed: usize, capacity: usize) -> Outcome {
    match needed > capacity {
        false => Ok(()),
        true => {
            let text = format!("{name} has room for {capacity}, but {needed} are needed");
            Err(Failure { status: aoji_status::Buffer, text })
        }
    }
}
