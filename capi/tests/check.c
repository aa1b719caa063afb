// What the C interface does and refuses, on the model inside the library. Ends with 0 when all is as it should be.
// Usage: check DIR    where DIR is for a file that it writes and removes
#define _POSIX_C_SOURCE 200809L // mkstemp
#include "aoji.h"
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHECK(condition)                                                                                               \
  do {                                                                                                                 \
    if (!(condition)) {                                                                                                \
      fprintf(stderr, "%s:%d: not so: %s; last error: %s\n", __FILE__, __LINE__, #condition, aoji_last_error());       \
      exit(1);                                                                                                         \
    }                                                                                                                  \
  } while (0)
#define OK(call) CHECK((call) == AOJI_STATUS_OK)
// The call fails with this status and says so in words that have `text`.
#define FAILS(status, text, call) CHECK((call) == AOJI_STATUS_##status && strstr(aoji_last_error(), text))

enum { CAPACITY = 256 };
static uint32_t prompt[CAPACITY];
static size_t prompt_count;
static uint32_t vocab, eos;

static uint64_t loaded, to_load;
static void progress(void *user, uint64_t done, uint64_t total) {
  CHECK(user == &loaded && done >= loaded);
  loaded = done;
  to_load = total;
}

// As a header after this one might have them.
typedef struct {
  aoji_open_options known;
  uint64_t more;
} newer_options;

static aoji_engine *open_demo(void) {
  newer_options options = {
      .known = {.size = sizeof options, .device = "cpu", .context = 300, .progress = progress, .user = &loaded}};
  aoji_engine *engine;
  OK(aoji_open("demo", &options.known, &engine));
  CHECK(loaded == to_load && loaded > 1000000);
  const aoji_info *info = aoji_engine_info(engine);
  CHECK(info->vocab == 2048 && info->max_context == 300 && !info->is_gpu && info->has_tokenizer && info->bos == 2046);
  CHECK(info->eos_count == 1 && info->eos[0] == 2047 && strlen(info->device) > 0);
  vocab = (uint32_t)info->vocab;
  eos = info->eos[0];
  return engine;
}

static void opening(void) {
  aoji_engine *engine = (aoji_engine *)&vocab;
  FAILS(NO_MODEL, "/nonexistent/model", aoji_open("/nonexistent/model", NULL, &engine));
  CHECK(engine == NULL);
  FAILS(INPUT, "model is NULL", aoji_open(NULL, NULL, &engine));
  FAILS(INPUT, "engine is NULL", aoji_open("demo", NULL, NULL));
  FAILS(INPUT, "model: byte 2 is not UTF-8", aoji_open("de\xff", NULL, &engine));
  aoji_open_options options = {.size = sizeof options, .device = "tpu"};
  FAILS(INPUT, "\"tpu\"", aoji_open("demo", &options, &engine));
  options.device = "cpu";
  options.context = 1 << 20;
  FAILS(INPUT, "context", aoji_open("demo", &options, &engine));
  options.context = 100;
  options.kv = "int8";
  FAILS(INPUT, "expected auto or fp8", aoji_open("demo", &options, &engine));
  options.kv = "fp8";
  OK(aoji_open("demo", &options, &engine));
  aoji_engine_free(engine);
  options.size = 0;
  FAILS(INPUT, "size is 0", aoji_open("demo", &options, &engine));
  // a newer header knows more: only what is asked for has to be known
  newer_options newer = {.known = {.size = sizeof newer}, .more = 1};
  FAILS(INPUT, "newer header", aoji_open("demo", &newer.known, &engine));
  CHECK(aoji_engine_info(NULL) == NULL && strstr(aoji_last_error(), "engine is NULL"));
  aoji_engine_free(NULL);
  aoji_session_free(NULL);
}

static void text(const aoji_engine *engine) {
  uint32_t ids[CAPACITY];
  size_t count = 7, length;
  char back[64];
  FAILS(BUFFER, "tokens has room for 0", aoji_tokenize(engine, "하늘은 파란색", 0, 1, NULL, 0, &count));
  CHECK(count > 1 && count < CAPACITY);
  OK(aoji_tokenize(engine, "하늘은 파란색", 0, 1, ids, count, &count));
  CHECK(ids[0] == 2046);
  FAILS(BUFFER, "text has room for 19", aoji_detokenize(engine, ids, count, 0, back, 19, &length));
  CHECK(length == 19);
  OK(aoji_detokenize(engine, ids, count, 0, back, length + 1, &length));
  CHECK(strcmp(back, "하늘은 파란색") == 0);
  OK(aoji_detokenize(engine, NULL, 0, 0, back, sizeof back, &length));
  CHECK(length == 0 && back[0] == 0);
  // somebody else's text is never a special token
  OK(aoji_tokenize(engine, "<|end_of_text|>", 0, 0, ids, CAPACITY, &count));
  CHECK(count > 1);
  OK(aoji_tokenize(engine, "<|end_of_text|>", 1, 0, ids, CAPACITY, &count));
  CHECK(count == 1 && ids[0] == eos);
  FAILS(INPUT, "text: byte 1 is not UTF-8", aoji_tokenize(engine, "a\xc3(", 0, 0, ids, CAPACITY, &count));
  FAILS(INPUT, "text is NULL", aoji_tokenize(engine, NULL, 0, 0, ids, CAPACITY, &count));
  FAILS(INPUT, "engine is NULL", aoji_tokenize(NULL, "a", 0, 0, ids, CAPACITY, &count));
  FAILS(INPUT, "count is NULL", aoji_tokenize(engine, "a", 0, 0, ids, CAPACITY, NULL));
  FAILS(INPUT, "tokens is NULL", aoji_tokenize(engine, "a", 0, 0, NULL, CAPACITY, &count));
  FAILS(INPUT, "tokens is NULL", aoji_detokenize(engine, NULL, 1, 0, back, sizeof back, &length));
  FAILS(INPUT, "length is NULL", aoji_detokenize(engine, ids, 1, 0, back, sizeof back, NULL));
  FAILS(INPUT, "cannot be at", aoji_detokenize(engine, ids, SIZE_MAX / 2, 0, back, sizeof back, &length));
}

static void prompts(const aoji_engine *engine) {
  OK(aoji_prompt(engine, "넌 누구니?", NULL, prompt, CAPACITY, &prompt_count));
  uint32_t other[CAPACITY];
  size_t count;
  aoji_message messages[] = {{"user", "안녕"}, {"assistant", "안녕하세요"}, {"user", "넌 누구니?"}};
  OK(aoji_prompt_messages(engine, messages + 2, 1, NULL, other, CAPACITY, &count));
  CHECK(count == prompt_count && memcmp(prompt, other, count * sizeof *other) == 0);
  OK(aoji_prompt_messages(engine, messages, 3, "짧게", other, CAPACITY, &count));
  CHECK(count != prompt_count);
  FAILS(INPUT, "an answer", aoji_prompt_messages(engine, messages, 2, NULL, other, CAPACITY, &count));
  FAILS(INPUT, "messages is NULL", aoji_prompt_messages(engine, NULL, 2, NULL, other, CAPACITY, &count));
  FAILS(INPUT, "question is NULL", aoji_prompt(engine, NULL, NULL, other, CAPACITY, &count));
  FAILS(INPUT, "instruction: byte 0", aoji_prompt(engine, "a", "\xff", other, CAPACITY, &count));
  messages[0].role = NULL;
  FAILS(INPUT, "role is NULL", aoji_prompt_messages(engine, messages, 3, NULL, other, CAPACITY, &count));
}

// What a generation gave.
typedef struct {
  aoji_session *session;
  char text[1024];
  uint32_t tokens[CAPACITY];
  size_t length, token_count, cancel_after;
  aoji_reason reason;
} result;

static int32_t collect(void *user, const aoji_event *event) {
  result *r = user;
  size_t count;
  // a call from the callback of a call on the same session is refused, and leaves it as it is
  FAILS(INPUT, "in use", aoji_sync(r->session, prompt, 1, &count));
  aoji_session_free(r->session);
  CHECK(event->text[event->length] == 0);
  if (event->kind == AOJI_EVENT_KIND_TOKEN) r->tokens[r->token_count++] = event->token;
  memcpy(r->text + r->length, event->text, event->length);
  r->length += event->length;
  if (event->kind == AOJI_EVENT_KIND_FINISH) {
    CHECK(event->tokens == r->token_count && event->prompt_tokens == prompt_count);
    r->reason = event->reason;
  }
  return r->cancel_after > 0 && r->token_count == r->cancel_after;
}

static int32_t never(void *user, size_t done, size_t total) {
  (void)user;
  CHECK(done == 0 && total == prompt_count);
  return 1;
}

// As few tokens as will do: under valgrind each takes a good part of a second.
static void generation(const aoji_engine *engine) {
  aoji_session *session;
  OK(aoji_session_new(engine, 0, &session));
  result whole = {.session = session};
  OK(aoji_generate(session, prompt, prompt_count, NULL, collect, &whole));
  CHECK(whole.reason == AOJI_REASON_STOP && whole.tokens[whole.token_count - 1] == eos);
  CHECK(strstr(whole.text, "데모 모델"));

  // the same by asking for each event; any other call ends it
  OK(aoji_start(session, prompt, prompt_count, NULL));
  const aoji_event *event;
  size_t tokens = 0;
  while (tokens < 3) {
    OK(aoji_next(session, &event));
    if (event->kind == AOJI_EVENT_KIND_TOKEN) CHECK(event->token == whole.tokens[tokens++]);
  }
  OK(aoji_stop(session));
  OK(aoji_next(session, &event));
  CHECK(event == NULL);

  result cut = {.session = session, .cancel_after = 2};
  FAILS(CANCELLED, "callback", aoji_generate(session, prompt, prompt_count, NULL, collect, &cut));
  CHECK(cut.token_count == 2 && cut.reason == AOJI_REASON_NONE);

  const char *stop[] = {"데모"};
  aoji_logit_bias forbid = {whole.tokens[0], -INFINITY};
  aoji_generate_options options = {.size = sizeof options, .stop = stop, .stop_count = 1};
  result stopped = {.session = session};
  OK(aoji_generate(session, prompt, prompt_count, &options, collect, &stopped));
  CHECK(stopped.reason == AOJI_REASON_STOP && !strstr(stopped.text, "데모"));
  CHECK(strncmp(stopped.text, whole.text, stopped.length) == 0 && stopped.length < whole.length);
  options = (aoji_generate_options){
      .size = sizeof options, .max_tokens = 3, .logit_bias = &forbid, .logit_bias_count = 1, .seed = 5, .temperature = 1};
  result other = {.session = session};
  OK(aoji_generate(session, prompt, prompt_count, &options, collect, &other));
  CHECK(other.reason == AOJI_REASON_LENGTH && other.token_count == 3 && other.tokens[0] != whole.tokens[0]);
  options = (aoji_generate_options){.size = sizeof options, .max_tokens = 1};
  OK(aoji_start(session, prompt, prompt_count, &options));
  do OK(aoji_next(session, &event));
  while (event && event->kind != AOJI_EVENT_KIND_FINISH);
  CHECK(event && event->reason == AOJI_REASON_LENGTH && event->tokens == 1 && event->reused_tokens > 0);
  OK(aoji_next(session, &event));
  CHECK(event == NULL);
  options = (aoji_generate_options){.size = sizeof options, .stop_ids = whole.tokens, .stop_id_count = 1};
  result first = {.session = session};
  OK(aoji_generate(session, prompt, prompt_count, &options, collect, &first));
  CHECK(first.token_count == 1 && first.reason == AOJI_REASON_STOP);

  // an older header ended before top_p: what stands there is not looked at
  options = (aoji_generate_options){.size = offsetof(aoji_generate_options, top_p), .top_p = 2};
  OK(aoji_start(session, prompt, prompt_count, &options));
  options.size = sizeof options;
  FAILS(INPUT, "top_p is 2", aoji_start(session, prompt, prompt_count, &options));
  options = (aoji_generate_options){.size = sizeof options, .stop_count = 1};
  FAILS(INPUT, "stop is NULL", aoji_start(session, prompt, prompt_count, &options));
  options = (aoji_generate_options){.size = sizeof options, .prompt_progress = never};
  OK(aoji_sync(session, &eos, 1, NULL));
  FAILS(CANCELLED, "prompt_progress", aoji_start(session, prompt, prompt_count, &options));
  FAILS(INPUT, "callback is NULL", aoji_generate(session, prompt, prompt_count, NULL, NULL, NULL));
  FAILS(INPUT, "event is NULL", aoji_next(session, NULL));
  FAILS(INPUT, "session is NULL", aoji_next(NULL, &event));
  FAILS(INPUT, "session is NULL", aoji_stop(NULL));
  uint32_t many[300] = {0};
  FAILS(CONTEXT, "301 tokens do not fit the context of 300", aoji_start(session, many, 300, NULL));
  aoji_session_free(session);
}

static void numbers(aoji_engine *engine, const char *dir) {
  aoji_session *session;
  FAILS(CONTEXT, "301 tokens", aoji_session_new(engine, 301, &session));
  CHECK(session == NULL);
  FAILS(INPUT, "engine is NULL", aoji_session_new(NULL, 0, &session));
  FAILS(INPUT, "session is NULL", aoji_session_new(engine, 0, NULL));
  OK(aoji_session_new(engine, 200, &session));
  aoji_engine_free(engine); // the session goes on

  float *logits = malloc(vocab * sizeof *logits);
  CHECK(logits);
  FAILS(INPUT, "no tokens", aoji_logits(session, logits, vocab));
  size_t reused = 9;
  OK(aoji_sync(session, prompt, prompt_count, &reused));
  CHECK(reused == 0);
  OK(aoji_sync(session, prompt, prompt_count, &reused));
  CHECK(reused == prompt_count);
  char saved[4096];
  snprintf(saved, sizeof saved, "%s/session-XXXXXX", dir);
  int fd = mkstemp(saved);
  CHECK(fd >= 0);
  close(fd);
  FAILS(FILE, "is empty", aoji_session_load(session, saved, NULL));
  OK(aoji_session_save(session, saved));
  OK(aoji_session_load(session, saved, &reused));
  CHECK(reused == prompt_count);
  OK(aoji_sync(session, prompt, prompt_count, &reused)); // its logits are not in the file
  CHECK(reused == prompt_count - 1);
  FAILS(INPUT, "path is NULL", aoji_session_save(session, NULL));
  remove(saved);
  FAILS(BUFFER, "logits has room for 2047", aoji_logits(session, logits, vocab - 1));
  FAILS(INPUT, "logits is NULL", aoji_logits(session, NULL, vocab));
  OK(aoji_logits(session, logits, vocab));
  double sum = 0;
  uint32_t best = 0;
  for (uint32_t i = 0; i < vocab; i++) best = logits[i] > logits[best] ? i : best;
  for (uint32_t i = 0; i < vocab; i++) sum += exp((double)logits[i] - (double)logits[best]);

  uint32_t continuation[] = {best, eos};
  float logprobs[2];
  double both;
  OK(aoji_score(session, prompt, prompt_count, continuation, 2, logprobs, &both));
  CHECK(fabs(logprobs[0] + log(sum)) < 1e-4 && fabs((double)logprobs[0] + (double)logprobs[1] - both) < 1e-6);
  OK(aoji_score(session, prompt, prompt_count, continuation, 1, NULL, NULL));
  OK(aoji_score(session, prompt, prompt_count, NULL, 0, NULL, &both));
  CHECK(both == 0);
  FAILS(INPUT, "no tokens", aoji_score(session, NULL, 0, continuation, 1, NULL, &both));
  FAILS(INPUT, "prefix is NULL", aoji_score(session, NULL, 1, continuation, 1, NULL, &both));

  FAILS(INPUT, "token 2048 is not below the vocabulary's 2048", aoji_sync(session, &vocab, 1, &reused));
  FAILS(INPUT, "tokens is NULL", aoji_sync(session, NULL, 1, &reused));
  FAILS(INPUT, "session is NULL", aoji_sync(NULL, prompt, 1, &reused));
  OK(aoji_sync(session, prompt, prompt_count, NULL)); // after all of that it still works
  free(logits);
  aoji_session_free(session);
}

// Each thread has its own last error; a session moves between them.
static void *elsewhere(void *session) {
  CHECK(strlen(aoji_last_error()) == 0);
  OK(aoji_sync(session, prompt, prompt_count, NULL));
  FAILS(INPUT, "no tokens", aoji_sync(session, NULL, 0, NULL));
  return NULL;
}

static void threads(const aoji_engine *engine) {
  aoji_session *sessions[2];
  pthread_t threads[2];
  FAILS(INPUT, "model is NULL", aoji_open(NULL, NULL, (aoji_engine *[]){NULL}));
  for (int i = 0; i < 2; i++) {
    OK(aoji_session_new(engine, 100, &sessions[i]));
    CHECK(pthread_create(&threads[i], NULL, elsewhere, sessions[i]) == 0);
  }
  for (int i = 0; i < 2; i++) {
    CHECK(pthread_join(threads[i], NULL) == 0);
    aoji_session_free(sessions[i]);
  }
  CHECK(strstr(aoji_last_error(), "model is NULL"));
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  CHECK(strlen(aoji_last_error()) == 0 && strchr(aoji_version(), '.'));
  opening();
  aoji_engine *engine = open_demo();
  text(engine);
  prompts(engine);
  generation(engine);
  threads(engine);
  numbers(engine, argv[1]); // frees it
  return 0;
}
