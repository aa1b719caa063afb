// The C interface of aoji. Made by cbindgen from src/capi; examples/c/generate.c shows it.
//
// Status      Functions that can fail return an aoji_status; aoji_last_error() has the text. Nothing aborts, nothing is printed.
// Text        is UTF-8 that ends with NUL. NULL where a pointer is needed is an error, never a crash.
// Buffers     are the caller's: (buffer, capacity, count), where *count is what is needed, written in any case.
// Options     are structures whose first field is their size and whose other zeros are defaults:
//               aoji_open_options options = {.size = sizeof options, .device = "cpu"};
//             So they can grow, and a program that was built with an older header goes on working.
// Handles     belong to the caller until they are freed, each once.
// Threads     An engine may be used by many threads at once. A session may be used by any thread, one at a time: a second one,
//             or a call from its own callback, is refused. aoji_last_error() is of the calling thread. Only freeing must not
//             happen while another thread still uses the handle.


#ifndef AOJI_H
#define AOJI_H

#include <stddef.h>
#include <stdint.h>

// What came of a call. More may be added.
typedef enum aoji_status {
  // It was done.
  AOJI_STATUS_OK = 0,
  // A callback ended it.
  AOJI_STATUS_CANCELLED = 1,
  // The buffer is too small; how much is needed was written. Asking with capacity 0 and NULL is allowed.
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
  // A bug of the library. A session that it happened in gives nothing else from then on and can only be freed.
  AOJI_STATUS_INTERNAL = 11,
} aoji_status;

// What an event is.
typedef enum aoji_event_kind {
  // A token was chosen: `token`.
  AOJI_EVENT_KIND_TOKEN = 0,
  // Text that is certain, whole characters and no part of a stop text: `text` and `length`.
  AOJI_EVENT_KIND_TEXT = 1,
  // The end, because of `reason`; nothing follows.
  AOJI_EVENT_KIND_FINISH = 2,
} aoji_event_kind;

// Why a text ended.
typedef enum aoji_reason {
  // It has not.
  AOJI_REASON_NONE = 0,
  // A token or a text that ends it.
  AOJI_REASON_STOP = 1,
  // `max_tokens`, or the session is full.
  AOJI_REASON_LENGTH = 2,
} aoji_reason;

// A loaded model. Any number of threads may use it at the same time.
typedef struct aoji_engine aoji_engine;

// One timeline of tokens with its KV cache. One thread at a time may use it, whichever that is.
typedef struct aoji_session aoji_session;

// Told how many bytes of the weights are on the device, and how many they are.
typedef void (*aoji_progress)(void *user, uint64_t done, uint64_t total);

// How a model is opened. Zero is the default of every field but `size`.
typedef struct aoji_open_options {
  // sizeof(aoji_open_options).
  size_t size;
  // "auto" (the default: the first GPU, else the CPU), "cpu", "cuda" or "cuda:N".
  const char *device;
  // Most tokens of a session; 0: the model's maximum, or as much of it as fits the GPU.
  size_t context;
  // Not 0: activations on the CPU are f32 instead of bf16.
  int32_t f32_activations;
  // NULL: nobody is told.
  aoji_progress progress;
  // First argument of `progress`.
  void *user;
} aoji_open_options;

// What a model is. More fields may be added at the end.
typedef struct aoji_info {
  // Tokens of the vocabulary: ids are below, and so many are the logits.
  size_t vocab;
  // Most tokens of a session.
  size_t max_context;
  // The device that it runs on, for people.
  const char *device;
  // Not 0: that is a GPU.
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
  // Which.
  uint32_t token;
  // How much; minus infinity forbids it.
  float bias;
} aoji_logit_bias;

// Told how many tokens of the prompt are computed, and how many they are, before each part of it; not 0 ends the call.
typedef int32_t (*aoji_prompt_progress)(void *user, size_t done, size_t total);

// How tokens are chosen and when a text ends. Zero is the default of every field but `size`: the most likely token each time.
typedef struct aoji_generate_options {
  // sizeof(aoji_generate_options).
  size_t size;
  // Most tokens; 0: until the text ends or the session is full.
  size_t max_tokens;
  // Divides the logits; 0 takes the most likely token.
  float temperature;
  // Only the so many most likely tokens; 0 is off.
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
  // The text does not end before so many tokens.
  uint32_t min_tokens;
  // The same seed and prompt give the same text.
  uint64_t seed;
  // Added to the logits of single tokens.
  const struct aoji_logit_bias *logit_bias;
  // How many.
  size_t logit_bias_count;
  // Texts before which the text ends.
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
  // NULL: nobody is told.
  aoji_prompt_progress prompt_progress;
  // First argument of `prompt_progress`.
  void *user;
  // Not 0: the next tokens are guessed by what was there before; the text is the same and comes faster where it repeats.
  int32_t speculate;
  // Tokens that may come, which are guesses too; `speculate` need not be set for them.
  const uint32_t *prediction;
  // How many.
  size_t prediction_count;
} aoji_generate_options;

// What a generation gives, in the order in which it happens. More fields may be added at the end.
typedef struct aoji_event {
  // What it is.
  enum aoji_event_kind kind;
  // Of AOJI_EVENT_KIND_TOKEN.
  uint32_t token;
  // Of AOJI_EVENT_KIND_TEXT, with a NUL after it; else empty.
  const char *text;
  // Bytes of `text`.
  size_t length;
  // Of AOJI_EVENT_KIND_FINISH.
  enum aoji_reason reason;
  // Tokens of the prompt.
  size_t prompt_tokens;
  // Of these, the ones that the session held already.
  size_t reused_tokens;
  // Tokens so far, with the one that ended the text.
  size_t tokens;
  // Seconds that the prompt took.
  double prompt_seconds;
  // Seconds from then to the last token.
  double decode_seconds;
  // Guesses of tokens that were tried.
  size_t drafted_tokens;
  // Of these, the ones that were right.
  size_t accepted_tokens;
} aoji_event;

// Told each event, which is valid until it returns; not 0 ends the generation. It must come back: no exception and no longjmp.
typedef int32_t (*aoji_callback)(void *user, const struct aoji_event *event);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Version of the library.
const char *aoji_version(void);

// What was wrong with the last call of this thread that did not give AOJI_STATUS_OK, where, and what was expected; empty when there
// was none. Valid until the next such call of this thread.
const char *aoji_last_error(void);

// Opens a model: a directory in Hugging Face layout, OWNER/NAME of the local Hugging Face cache, or "demo", which is inside the
// library. `options` may be NULL. `*engine` is NULL unless it was done.
enum aoji_status aoji_open(const char *model,
                           const struct aoji_open_options *options,
                           struct aoji_engine **engine);

// Frees a handle; NULL is nothing. Sessions go on: the model is freed with the last of them.
void aoji_engine_free(struct aoji_engine *engine);

// What the model is; valid until the engine is freed. NULL for NULL.
const struct aoji_info *aoji_engine_info(const struct aoji_engine *engine);

// Tokens of a text. With `parse_special` the text of a special token becomes that token: not for text of somebody else. With
// `add_special` the model's BOS stands in front, once.
enum aoji_status aoji_tokenize(const struct aoji_engine *engine,
                               const char *text,
                               int32_t parse_special,
                               int32_t add_special,
                               uint32_t *tokens,
                               size_t capacity,
                               size_t *count);

// Text of tokens, with a NUL after its `*length` bytes, so a capacity of `*length` + 1 is needed. Special tokens are left out, unless
// `with_special`.
enum aoji_status aoji_detokenize(const struct aoji_engine *engine,
                                 const uint32_t *tokens,
                                 size_t count,
                                 int32_t with_special,
                                 char *text,
                                 size_t capacity,
                                 size_t *length);

// The prompt for a question in the form that the model was trained on. `instruction` may be NULL: the template's own.
enum aoji_status aoji_prompt(const struct aoji_engine *engine,
                             const char *question,
                             const char *instruction,
                             uint32_t *tokens,
                             size_t capacity,
                             size_t *count);

// As `aoji_prompt`, for a conversation whose last message is to be answered.
enum aoji_status aoji_prompt_messages(const struct aoji_engine *engine,
                                      const struct aoji_message *messages,
                                      size_t message_count,
                                      const char *instruction,
                                      uint32_t *tokens,
                                      size_t capacity,
                                      size_t *count);

// An empty session with room for `max_tokens` tokens; 0: as many as the engine allows. It keeps the model alive. `*session` is NULL
// unless it was done.
enum aoji_status aoji_session_new(const struct aoji_engine *engine,
                                  size_t max_tokens,
                                  struct aoji_session **session);

// Frees a handle and its memory on the device; NULL is nothing. Not from a callback of a call on it: then it does nothing.
void aoji_session_free(struct aoji_session *session);

// Makes the timeline equal to `tokens`, at least one, and computes only what differs from what it holds; the logits after the last
// are then ready. `reused`, which may be NULL, gets how many tokens did not have to be computed.
enum aoji_status aoji_sync(struct aoji_session *session,
                           const uint32_t *tokens,
                           size_t count,
                           size_t *reused);

// Copies the logits after the last token of the timeline, as many as the vocabulary has tokens.
enum aoji_status aoji_logits(struct aoji_session *session, float *logits, size_t capacity);

// Natural logarithms of the probabilities of the tokens of `continuation` after `prefix`, each given those before it: one by one to
// `logprobs`, which may be NULL, and added up to `sum`, which may be NULL. The prefix is computed once for many continuations.
enum aoji_status aoji_score(struct aoji_session *session,
                            const uint32_t *prefix,
                            size_t prefix_count,
                            const uint32_t *continuation,
                            size_t continuation_count,
                            float *logprobs,
                            double *sum);

// Computes what the session does not hold of a prompt and begins to continue it; `aoji_next` gives what comes. `options` may be
// NULL. Any other call on the session ends the generation.
enum aoji_status aoji_start(struct aoji_session *session,
                            const uint32_t *prompt,
                            size_t count,
                            const struct aoji_generate_options *options);

// Waits for the next event of the generation. It is valid until the next call on the session; NULL after the end, or where nothing
// was started.
enum aoji_status aoji_next(struct aoji_session *session,
                           const struct aoji_event **event);

// Ends the generation, which otherwise goes on in the background for some tokens. What it gave stays in the timeline.
enum aoji_status aoji_stop(struct aoji_session *session);

// `aoji_start`, then `callback` with each event to the end.
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
