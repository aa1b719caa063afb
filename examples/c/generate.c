// Answers a question with a model: ./generate [MODEL [QUESTION [DEVICE]]], without arguments the model inside the library.
//
// Build the library, then this program against it:
//   cargo build --release -p aoji-capi
//   cc -std=c11 -Icapi/include examples/c/generate.c -Ltarget/release -laoji -Wl,-rpath,$PWD/target/release -o generate
// Or without a shared library:
//   cc -std=c11 -Icapi/include examples/c/generate.c target/release/libaoji.a -lpthread -ldl -lm -o generate
#include "aoji.h"
#include <stdio.h>
#include <stdlib.h>

static void check(aoji_status status) {
  if (status != AOJI_STATUS_OK) {
    fprintf(stderr, "error: %s\n", aoji_last_error());
    exit(1);
  }
}

// Not 0 would end the answer.
static int32_t show(void *user, const aoji_event *event) {
  (void)user;
  if (event->kind == AOJI_EVENT_KIND_TEXT) {
    fwrite(event->text, 1, event->length, stdout);
    fflush(stdout);
  } else if (event->kind == AOJI_EVENT_KIND_FINISH) {
    double seconds = event->decode_seconds > 0 ? event->decode_seconds : 1;
    fprintf(stderr, "\n[%zu tokens, %.1f tokens/s]\n", event->tokens, (double)event->tokens / seconds);
  }
  return 0;
}

int main(int argc, char **argv) {
  const char *model = argc > 1 ? argv[1] : "demo";
  const char *question = argc > 2 ? argv[2] : "넌 누구니?";
  aoji_open_options open = {.size = sizeof open, .device = argc > 3 ? argv[3] : "auto"};
  aoji_engine *engine;
  check(aoji_open(model, &open, &engine));
  aoji_session *session;
  check(aoji_session_new(engine, 0, &session));

  size_t count;
  aoji_prompt(engine, question, NULL, NULL, 0, &count); // says how many tokens there will be
  uint32_t *prompt = malloc(count * sizeof *prompt);
  if (!prompt) return 1;
  check(aoji_prompt(engine, question, NULL, prompt, count, &count));

  aoji_generate_options options = {.size = sizeof options, .temperature = 0}; // the most likely token each time
  check(aoji_generate(session, prompt, count, &options, show, NULL));
  printf("\n");

  free(prompt);
  aoji_session_free(session);
  aoji_engine_free(engine);
  return 0;
}
