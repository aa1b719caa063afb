// text.h - the text of a module, as tokens.
#pragma once
#include <string_view>

#include "ptx.h"

namespace ptx {
struct Token {
  std::string_view text;
  uint32_t line;
  bool inlined;  // between nvcc's comments "begin inline asm" and "end inline asm"
};
struct Range {
  size_t begin, end;  // of tokens
};
struct Variable {  // .shared or .local
  unsigned align, bytes;
  bool dynamic;  // of a size that the launch gives
};
struct Kernel {  // before it is compiled
  Range parameters, body;
  uint32_t line;
};
struct Module {
  std::string text, file, target;
  std::vector<Token> tokens;
  std::map<std::string, std::string> sources;  // of .file, by its number
  std::map<std::string, Variable> shared;
  std::map<std::string, Kernel> kernels;
  std::map<std::string, std::unique_ptr<Entry>> compiled;
};
[[noreturn]] void wrong(const Module&, uint32_t line, const std::string& what);
uint64_t number(const Module&, const Token&);
uint64_t number_up_to(uint64_t most, const Module&, const Token&);

// Reads tokens in order.
struct Reader {
  const Module& m;
  size_t at, end;
  bool done() const { return at >= end; }
  const Token& peek() const {
    if (done()) wrong(m, m.tokens.empty() ? 1 : m.tokens.back().line, "the text ends too early");
    return m.tokens[at];
  }
  bool next_is(std::string_view text) const { return !done() && m.tokens[at].text == text; }
  const Token& take() {
    const Token& t = peek();
    at++;
    return t;
  }
  bool skip(std::string_view text) {
    if (!next_is(text)) return false;
    at++;
    return true;
  }
  void expect(std::string_view text) {
    if (!skip(text))
      wrong(m, peek().line, "expected \"" + std::string(text) + "\" and found \"" + std::string(peek().text) + "\"");
  }
  void skip_line() {
    for (uint32_t line = peek().line; !done() && peek().line == line;) at++;
  }
  void skip_statement() {
    while (take().text != ";") {
    }
  }
  Range skip_braces() {  // from the opening one
    expect("{");
    size_t begin = at;
    for (int depth = 1; depth;) {
      std::string_view t = take().text;
      depth += t == "{" ? 1 : t == "}" ? -1 : 0;
    }
    return {begin, at - 1};
  }
};
struct Declared {
  std::string name;
  Variable v;
};
Declared variable(Reader&);  // after .shared, .local or .param: up to the name and its size
unsigned type_bytes(const Module&, const Token&);
std::unique_ptr<Entry> compile(const Module&, const std::string& name, const Kernel&);
}  // namespace ptx
