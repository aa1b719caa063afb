// The C interface of aoji. Made by cbindgen from capi/src; examples/c/generate.c shows it.
//
// Status      Functions that can fail return an aoji_status; aoji_last_error() has the text. Nothing aborts, nothing is printed.
// Text        is UTF-8 that ends with NUL. NULL where a pointer is needed is an error, never a crash.
// Buffers     are the caller's: (buffer, capacity, count), where *count is what is needed, written in any case.
// Options     are structures whose first field is their size and whose other zeros are defaults:
//               aoji_open_options options = {.size = sizeof options, .device = "cpu"};
//             So they can grow, and a program that was built with an older header goes on working.
// Handles     belong to the caller until they are freed, each once.
// Threads     An engine may be used by many threads at once. A session may be used by any thread, one at a time: a second one,
//             or a call from its own callback, is refused. aoji_last_error() is about the calling thread. Only freeing must not
//             happen while another thread still uses the handle.


#ifndef AOJI_H
#define AOJI_H

#include <stddef.h>
#include <stdint.h>

// Result of a call. More may be added.
typedef enum aoji_status {
  // Success.
  AOJI_STATUS_OK = 0,
  // A callback ended the call.
  AOJI_STATUS_CANCELLED = 1,
  // The buffer is too small; the needed size was written. Asking with capacity 0 and NULL is allowed.
  AOJI_STATUS_BUFFER = 2,
  // An argument is NULL, out of range, or not UTF-8.
  AOJI_STATUS_INPUT = 3,
  // The tokens do not fit the context.
  AOJI_STATUS_CONTEXT = 4,
  // There is no such model.
  AOJI_STATUS_NO_MODEL = 5,
  // A file is missing, unreadable, or not what it should be.
  AOJI_STATUS_FILE = 6,
  // A model of a kind that aoji does not run.
  AOJI_STATUS_UNSUPPORTED = 7,
  // Weights or KV cache do not fit the memory of the device.
  AOJI_STATUS_MEMORY = 8,
  // The GPU cannot be used.
  AOJI_STATUS_NO_GPU = 9,
  // The GPU or its driver failed.
  AOJI_STATUS_CUDA = 10,
  // A bug of the library. The session in which it happened returns only this from then on and can only be freed.
  AOJI_STATUS_INTERNAL = 11,
} aoji_status;

// What an event is.
typedef enum aoji_event_kind {
  // A token was chosen: `token`.
  AOJI_EVENT_KIND_TOKEN = 0,
  // Text that is certain (whole characters, and no part of a stop text): `text` and `length`.
  AOJI_EVENT_KIND_TEXT = 1,
  // The end, because of `reason`; nothing follows.
  AOJI_EVENT_KIND_FINISH = 2,
} aoji_event_kind;

// Why a text ended.
typedef enum aoji_reason {
  // It has not ended.
  AOJI_REASON_NONE = 0,
  // A token or a text that ends it.
  AOJI_REASON_STOP = 1,
  // `max_tokens`, or the session is full.
  AOJI_REASON_LENGTH = 2,
} aoji_reason;

// A loaded model. Any number of threads may use it at the same time.
typedef struct aoji_engine aoji_engine;

// A sequence of tokens with its KV cache (the keys and values of attention). Any thread may use it, but only one at a
// time.
typedef struct aoji_session aoji_session;

// Called with the number of bytes of weights that are on the device, and their total.
typedef void (*aoji_progress)(void *user, uint64_t done, uint64_t total);

// How a model is opened. Zero is the default of every field but `size`.
typedef struct aoji_open_options {
  // sizeof(aoji_open_options).
  size_t size;
  // "auto" (the default: the first GPU, else the CPU), "cpu", "cuda" or "cuda:N".
  const char *device;
  // Most tokens of a session. 0: the model's maximum, or as much of it as fits the GPU.
  size_t context;
  // Not 0: activations on the CPU are f32 instead of bf16.
  int32_t f32_activations;
  // NULL: no reports.
  aoji_progress progress;
  // First argument of `progress`.
  void *user;
  // NULL, or a smaller model of this name with the same vocabulary, on the same device: it guesses next tokens where
  // `speculate` is 2.
  const char *draft;
  // "q8_0", "q6_k", "q4_k", "q4_0", "fp8", "int8", "int4" or, for groups of 64 columns, "int4:64": the weights are quantized
  // while they are loaded. NULL: they stay as they are.
  const char *quantize;
  // "auto" or NULL: keys and values are stored as activations are; "fp8": in half the memory of bf16, with some loss of precision.
  const char *kv;
} aoji_open_options;

// A description of the model. More fields may be added at the end.
typedef struct aoji_info {
  // Number of tokens in the vocabulary: ids are below this, and there are as many logits.
  size_t vocab;
  // Most tokens of a session.
  size_t max_context;
  // The device that it runs on, for people.
  const char *device;
  // Not 0: the device is a GPU.
  int32_t is_gpu;
  // 0: the model has no tokenizer, and only token ids can be used.
  int32_t has_tokenizer;
  // The token that begins a text; -1: none.
  int64_t bos;
  // The tokens that end a text.
  const uint32_t *eos;
  // How many.
  size_t eos_count;
} aoji_info;

// One message of a conversation.
typedef struct aoji_message {
  // "system", "user" or "assistant".
  const char *role;
  // What is said.
  const char *content;
} aoji_message;

// Added to the logit of a token.
typedef struct aoji_logit_bias {
  // Id of the token.
  uint32_t token;
  // Added to its logit; minus infinity forbids it.
  float bias;
} aoji_logit_bias;

// Called before each part of a prompt with the number of tokens computed so far, and their total. If it returns not 0,
// the call ends.
typedef int32_t (*aoji_prompt_progress)(void *user, size_t done, size_t total);

// How tokens are chosen and when a text ends. Zero is the default of every field but `size`: the most likely token is
// taken.
typedef struct aoji_generate_options {
  // sizeof(aoji_generate_options).
  size_t size;
  // Most tokens; 0: until the text ends or the session is full.
  size_t max_tokens;
  // Divides the logits; 0 takes the most likely token.
  float temperature;
  // Only this many of the most likely tokens; 0 is off.
  uint32_t top_k;
  // Only the most likely tokens that together have this probability; 0 and 1 are off.
  float top_p;
  // Only tokens with at least this share of the most likely one's probability; 0 is off.
  float min_p;
  // Divides the logits of tokens in prompt and answer; 0 and 1 are off.
  float repetition_penalty;
  // Taken from a token's logit for each time that it is in the answer.
  float frequency_penalty;
  // Taken from the logit of each token in the answer.
  float presence_penalty;
  // The text does not end before it has this many tokens.
  uint32_t min_tokens;
  // The same seed and prompt give the same text.
  uint64_t seed;
  // Added to the logits of single tokens.
  const struct aoji_logit_bias *logit_bias;
  // How many.
  size_t logit_bias_count;
  // The text ends before the first of these texts.
  const char *const *stop;
  // How many.
  size_t stop_count;
  // Tokens that end the text besides the model's own.
  const uint32_t *stop_ids;
  // How many.
  size_t stop_id_count;
  // Not 0: a text of `stop` that ends the text stays in it.
  int32_t include_stop;
  // Not 0: special tokens appear in the text.
  int32_t keep_special;
  // Not 0: the model's own tokens do not end the text.
  int32_t ignore_eos;
  // NULL: no reports.
  aoji_prompt_progress prompt_progress;
  // First argument of `prompt_progress`.
  void *user;
  // Not 0: the next tokens are guessed; the text is the same, and comes faster where guesses are right. 1: the guesses
  // come from text that was there before; 2: from the engine's draft model.
  int32_t speculate;
  // Tokens that may come; they are used as guesses too, even without `speculate`.
  const uint32_t *prediction;
  // How many.
  size_t prediction_count;
} aoji_generate_options;

// One event. Events come in the order in which things happen. More fields may be added at the end.
typedef struct aoji_event {
  // Which kind of event it is.
  enum aoji_event_kind kind;
  // For AOJI_EVENT_KIND_TOKEN.
  uint32_t token;
  // For AOJI_EVENT_KIND_TEXT, with a NUL after it; else empty.
  const char *text;
  // Bytes of `text`.
  size_t length;
  // For AOJI_EVENT_KIND_FINISH.
  enum aoji_reason reason;
  // Tokens of the prompt.
  size_t prompt_tokens;
  // How many of these the session held already.
  size_t reused_tokens;
  // Tokens so far, including the one that ended the text.
  size_t tokens;
  // Seconds that the prompt took.
  double prompt_seconds;
  // Seconds from the end of the prompt to the last token.
  double decode_seconds;
  // Guesses of tokens that were tried.
  size_t drafted_tokens;
  // How many of these guesses were right.
  size_t accepted_tokens;
} aoji_event;

// Called with each event, which is valid until the callback returns; if it returns not 0, the generation ends. It must
// return: no exception and no longjmp.
typedef int32_t (*aoji_callback)(void *user, const struct aoji_event *event);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Version of the library.
const char *aoji_version(void);

// What was wrong with the last call of this thread that did not return AOJI_STATUS_OK, where, and what was expected;
// empty if there was none. Valid until the next such call of this thread.
const char *aoji_last_error(void);

// Opens a model: a directory in Hugging Face layout, a GGUF file, OWNER/NAME of the local Hugging Face cache, or "demo", which is
// inside the library. `options` may be NULL. If the call fails, `*engine` is NULL.
enum aoji_status aoji_open(const char *model,
                           const struct aoji_open_options *options,
                           struct aoji_engine **engine);

// Frees a handle; NULL is allowed. Its sessions can still be used: the model is freed with the last of them.
void aoji_engine_free(struct aoji_engine *engine);

// Describes the model; valid until the engine is freed. NULL for NULL.
const struct aoji_info *aoji_engine_info(const struct aoji_engine *engine);

// Tokens of a text. With `parse_special`, the text of a special token becomes that token; do not use this for text
// that others wrote. With `add_special`, the model's BOS is put in front, once.
enum aoji_status aoji_tokenize(const struct aoji_engine *engine,
                               const char *text,
                               int32_t parse_special,
                               int32_t add_special,
                               uint32_t *tokens,
                               size_t capacity,
                               size_t *count);

// Text of tokens, followed by a NUL that `*length` does not count, so a capacity of `*length` + 1 bytes is needed.
// Special tokens are left out, except with `with_special`.
enum aoji_status aoji_detokenize(const struct aoji_engine *engine,
                                 const uint32_t *tokens,
                                 size_t count,
                                 int32_t with_special,
                                 char *text,
                                 size_t capacity,
                                 size_t *length);

// The prompt for a question, in the form that the model was trained on. With NULL as `instruction`, the template's own
// is used.
enum aoji_status aoji_prompt(const struct aoji_engine *engine,
                             const char *question,
                             const char *instruction,
                             uint32_t *tokens,
                             size_t capacity,
                             size_t *count);

// As `aoji_prompt`, for a conversation whose last message is the one to answer.
enum aoji_status aoji_prompt_messages(const struct aoji_engine *engine,
                                      const struct aoji_message *messages,
                                      size_t message_count,
                                      const char *instruction,
                                      uint32_t *tokens,
                                      size_t capacity,
                                      size_t *count);

// Makes an empty session with room for `max_tokens` tokens, or with 0 as many as the engine allows. It keeps the model
// alive. If the call fails, `*session` is NULL.
enum aoji_status aoji_session_new(const struct aoji_engine *engine,
                                  size_t max_tokens,
                                  struct aoji_session **session);

// Frees a handle and its memory on the device; NULL is allowed. From a callback of a call on the same session, it does
// nothing.
void aoji_session_free(struct aoji_session *session);

// Makes the session hold exactly `tokens`, at least one, and computes only what differs from the tokens that it
// already holds; the logits after the last token are then ready. `reused`, which may be NULL, gets how many tokens did
// not have to be computed.
enum aoji_status aoji_sync(struct aoji_session *session,
                           const uint32_t *tokens,
                           size_t count,
                           size_t *reused);

// Writes the session's computed tokens, with their keys and values, to a file. A file that is there is replaced once the new one is
// complete.
enum aoji_status aoji_session_save(struct aoji_session *session,
                                   const char *path);

// Replaces what the session holds with a file of `aoji_session_save`, of the same model, device and version of aoji. `count`, which may
// be NULL, gets how many tokens it has. If the call fails, the session stays as it was.
enum aoji_status aoji_session_load(struct aoji_session *session,
                                   const char *path,
                                   size_t *count);

// Copies the logits after the last token of the session; there are as many as tokens in the vocabulary.
enum aoji_status aoji_logits(struct aoji_session *session,
                             float *logits,
                             size_t capacity);

// Natural logarithms of the probabilities of the tokens of `continuation` after `prefix`, each given the tokens before
// it. They go one by one to `logprobs`, and their sum to `sum`; either may be NULL. For many continuations, the prefix
// is computed once.
enum aoji_status aoji_score(struct aoji_session *session,
                            const uint32_t *prefix,
                            size_t prefix_count,
                            const uint32_t *continuation,
                            size_t continuation_count,
                            float *logprobs,
                            double *sum);

// Computes the part of a prompt that the session does not hold, and begins to continue the prompt; `aoji_next` gives
// the events. `options` may be NULL. Any other call on the session ends the generation.
enum aoji_status aoji_start(struct aoji_session *session,
                            const uint32_t *prompt,
                            size_t count,
                            const struct aoji_generate_options *options);

// Waits for the next event of the generation. The event is valid until the next call on the session; it is NULL after
// the end, or if nothing was started.
enum aoji_status aoji_next(struct aoji_session *session,
                           const struct aoji_event **event);

// Ends the generation, which may otherwise go on in the background for a few tokens. The tokens that it gave stay in
// the session.
enum aoji_status aoji_stop(struct aoji_session *session);

// `aoji_start`, then calls `callback` with each event until the end.
enum aoji_status aoji_generate(struct aoji_session *session,
                               const uint32_t *prompt,
                               size_t count,
                               const struct aoji_generate_options *options,
                               aoji_callback callback,
                               void *user);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* AOJI_H */
