//! Models, and text to tokens and back.

use super::{Outcome, aoji_status, elements, fill, given, guard, text};
use aoji::{Activations, Device, Engine, KvDtype, Message, Options, Result, Tokenizer};
use std::{
    ffi::{CString, c_char, c_void},
    ptr,
};

/// Called with the number of bytes of weights that are on the device, and their total.
pub type aoji_progress = Option<unsafe extern "C" fn(user: *mut c_void, done: u64, total: u64)>;

/// How a model is opened. Zero is the default of every field but `size`.
#[repr(C)]
pub struct aoji_open_options {
    /// sizeof(aoji_open_options).
    pub(super) size: usize,
    /// "auto" (the default: the first GPU, else the CPU), "cpu", "cuda" or "cuda:N".
    pub(super) device: *const c_char,
    /// Most tokens of a session. 0: the model's maximum, or as much of it as fits the GPU.
    context: usize,
    /// Not 0: activations on the CPU are f32 instead of bf16.
    f32_activations: i32,
    /// NULL: no reports.
    progress: aoji_progress,
    /// First argument of `progress`.
    user: *mut c_void,
    /// NULL, or a smaller model of this name with the same vocabulary, on the same device: it guesses next tokens where
    /// `speculate` is 2.
    draft: *const c_char,
    /// "q8_0", "q6_k", "q4_k", "q4_0", "fp8", "int8", "int4" or, for groups of 64 columns, "int4:64": the weights are quantized
    /// while they are loaded. NULL: they stay as they are.
    pub(super) quantize: *const c_char,
    /// "auto" or NULL: keys and values are stored as activations are; "fp8": in half the memory of bf16, with some loss of precision.
    pub(super) kv: *const c_char,
}

/// A description of the model. More fields may be added at the end.
#[repr(C)]
pub struct aoji_info {
    /// Number of tokens in the vocabulary: ids are below this, and there are as many logits.
    vocab: usize,
    /// Most tokens of a session.
    max_context: usize,
    /// The device that it runs on, for people.
    device: *const c_char,
    /// Not 0: the device is a GPU.
    is_gpu: i32,
    /// 0: the model has no tokenizer, and only token ids can be used.
    has_tokenizer: i32,
    /// The token that begins a text; -1: none.
    bos: i64,
    /// The tokens that end a text.
    eos: *const u32,
    /// How many.
    eos_count: usize,
}

/// One message of a conversation.
#[repr(C)]
pub struct aoji_message {
    /// "system", "user" or "assistant".
    role: *const c_char,
    /// What is said.
    content: *const c_char,
}

/// A loaded model. Any number of threads may use it at the same time.
pub struct aoji_engine {
    pub(super) engine: Engine,
    info: aoji_info,
    /// What `info` points to.
    _device: CString,
    _eos: Vec<u32>,
}

/// An engine is used by many threads at once, so it has to allow that.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Engine>();
};

impl aoji_engine {
    fn new(engine: Engine) -> aoji_engine {
        let device = CString::new(engine.device().replace('\0', " ")).unwrap_or_default();
        let eos = engine.config().eos.clone();
        let bos = engine.tokenizer().ok().and_then(Tokenizer::bos).or(engine.config().bos);
        let info = aoji_info {
            vocab: engine.config().vocab,
            max_context: engine.max_context(),
            device: device.as_ptr(),
            is_gpu: engine.is_gpu().into(),
            has_tokenizer: engine.tokenizer().is_ok().into(),
            bos: bos.map_or(-1, i64::from),
            eos: eos.as_ptr(),
            eos_count: eos.len(),
        };
        aoji_engine { engine, info, _device: device, _eos: eos }
    }
}

/// The engine behind a handle.
///
/// # Safety
/// `engine` is NULL or a handle that was not freed.
pub(super) unsafe fn engine<'a>(engine: *const aoji_engine) -> Result<&'a aoji_engine> {
    // SAFETY: not NULL, so a live handle; nothing of it is ever changed.
    Ok(unsafe { given("engine", engine.cast_mut())?.as_ref() })
}

/// Opens a model: a directory in Hugging Face layout, a GGUF file, OWNER/NAME of the local Hugging Face cache, or "demo", which is
/// inside the library. `options` may be NULL. If the call fails, `*engine` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_open(
    model: *const c_char,
    options: *const aoji_open_options,
    engine: *mut *mut aoji_engine,
) -> aoji_status {
    guard(|| {
        let out = given("engine", engine)?;
        // SAFETY: not NULL, so a place for a handle.
        unsafe { out.write(ptr::null_mut()) };
        // SAFETY: as the caller promises; all bytes of the options may be zero: numbers and pointers that may be NULL.
        let (model, asked) = unsafe { (text("model", model)?, super::options(options)?) };
        let device = match asked.device.is_null() {
            true => Device::Auto,
            // SAFETY: a text, as the caller promises.
            false => unsafe { text("device", asked.device) }?.parse().map_err(super::wrong)?,
        };
        let activations = if asked.f32_activations == 0 { Activations::Bf16 } else { Activations::F32 };
        let context = (asked.context > 0).then_some(asked.context);
        let quantize = match asked.quantize.is_null() {
            true => None,
            // SAFETY: a text, as the caller promises.
            false => Some(unsafe { text("quantize", asked.quantize) }?.parse().map_err(super::wrong)?),
        };
        let kv = match asked.kv.is_null() {
            true => KvDtype::Auto,
            // SAFETY: a text, as the caller promises.
            false => unsafe { text("kv", asked.kv) }?.parse().map_err(super::wrong)?,
        };
        let mut options = Options { device, activations, context, quantize, kv, ..Options::default() };
        if !asked.draft.is_null() {
            // SAFETY: a text, as the caller promises.
            options = options.with_draft(unsafe { text("draft", asked.draft) }?, model)?;
        }
        let opened = Engine::open_with(model, &options, &mut |done, total| {
            if let Some(progress) = asked.progress {
                // SAFETY: a function of this type, as the caller promises.
                unsafe { progress(asked.user, done, total) };
            }
        })?;
        // SAFETY: as above.
        unsafe { out.write(Box::into_raw(Box::new(aoji_engine::new(opened)))) };
        Ok(())
    })
}

/// Frees a handle; NULL is allowed. Its sessions can still be used: the model is freed with the last of them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_engine_free(engine: *mut aoji_engine) {
    guard(|| {
        if !engine.is_null() {
            // SAFETY: a handle of `aoji_open` that was not freed; nobody uses it any more.
            drop(unsafe { Box::from_raw(engine) });
        }
        Ok(())
    });
}

/// Describes the model; valid until the engine is freed. NULL for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_engine_info(engine: *const aoji_engine) -> *const aoji_info {
    let mut info = ptr::null();
    guard(|| {
        // SAFETY: as the caller promises.
        info = &raw const unsafe { self::engine(engine) }?.info;
        Ok(())
    });
    info
}

/// Tokens of a text. With `parse_special`, the text of a special token becomes that token; do not use this for text
/// that others wrote. With `add_special`, the model's BOS is put in front, once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_tokenize(
    engine: *const aoji_engine,
    text: *const c_char,
    parse_special: i32,
    add_special: i32,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> aoji_status {
    guard(|| {
        // SAFETY: as the caller promises.
        let (engine, text) = unsafe { (self::engine(engine)?, super::text("text", text)?) };
        let tokenizer = engine.engine.tokenizer()?;
        let mut ids = if parse_special != 0 { tokenizer.encode(text, false)? } else { tokenizer.encode_plain(text)? };
        let bos = tokenizer.bos().filter(|bos| add_special != 0 && ids.first() != Some(bos));
        ids.splice(..0, bos);
        // SAFETY: as the caller promises.
        unsafe { fill("tokens", &ids, tokens, capacity, count) }
    })
}

/// Text of tokens, followed by a NUL that `*length` does not count, so a capacity of `*length` + 1 bytes is needed.
/// Special tokens are left out, except with `with_special`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_detokenize(
    engine: *const aoji_engine,
    tokens: *const u32,
    count: usize,
    with_special: i32,
    text: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> aoji_status {
    guard(|| {
        // SAFETY: as the caller promises.
        let (engine, tokens) = unsafe { (self::engine(engine)?, elements("tokens", tokens, count)?) };
        let decoded = engine.engine.tokenizer()?.decode(tokens, with_special == 0)?;
        let length = given("length", length)?;
        // SAFETY: not NULL, so valid.
        unsafe { length.write(decoded.len()) };
        let mut all = 0;
        // SAFETY: as the caller promises; `all` is valid.
        unsafe { fill("text", (decoded + "\0").as_bytes(), text.cast(), capacity, &mut all) }
    })
}

/// The prompt for a question, in the form that the model was trained on. With NULL as `instruction`, the template's own
/// is used.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_prompt(
    engine: *const aoji_engine,
    question: *const c_char,
    instruction: *const c_char,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> aoji_status {
    guard(|| {
        // SAFETY: as the caller promises.
        let messages = [Message::new("user", unsafe { text("question", question) }?)];
        // SAFETY: as the caller promises.
        unsafe { prompt(engine, &messages, instruction, tokens, capacity, count) }
    })
}

/// As `aoji_prompt`, for a conversation whose last message is the one to answer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_prompt_messages(
    engine: *const aoji_engine,
    messages: *const aoji_message,
    message_count: usize,
    instruction: *const c_char,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> aoji_status {
    guard(|| {
        // SAFETY: as the caller promises.
        let messages = unsafe { elements("messages", messages, message_count) }?;
        let message = |m: &aoji_message| {
            // SAFETY: texts, as the caller promises.
            unsafe { Ok(Message::new(text("role", m.role)?, text("content", m.content)?)) }
        };
        let messages = messages.iter().map(message).collect::<Result<Vec<_>>>()?;
        // SAFETY: as the caller promises.
        unsafe { prompt(engine, &messages, instruction, tokens, capacity, count) }
    })
}

/// # Safety
/// That of [`aoji_prompt`].
unsafe fn prompt(
    engine: *const aoji_engine,
    messages: &[Message],
    instruction: *const c_char,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> Outcome {
    // SAFETY: as the caller promises.
    let engine = &unsafe { self::engine(engine) }?.engine;
    // SAFETY: a text, as the caller promises.
    let instruction = (!instruction.is_null()).then(|| unsafe { text("instruction", instruction) }).transpose()?;
    let ids = engine.template().encode(engine.tokenizer()?, messages, instruction)?;
    // SAFETY: as the caller promises.
    unsafe { fill("tokens", &ids, tokens, capacity, count) }
}
