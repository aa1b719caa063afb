// text.cpp - the text of a module: its tokens, and what it declares.
#include "text.h"

#include <algorithm>

namespace ptx {
void wrong(const Module& m, uint32_t line, const std::string& what) {
  throw Error{m.file + ":" + std::to_string(line) + ": " + what};
}
static bool is_word(char c) { return isalnum((unsigned char)c) || c == '_' || c == '.' || c == '$' || c == '%'; }
static void tokenise(Module& m) {
  std::string_view s = m.text;
  uint32_t line = 1;
  bool inlined = false;
  auto push = [&](size_t at, size_t n) { m.tokens.push_back({s.substr(at, n), line, inlined}); };
  for (size_t i = 0; i < s.size();) {
    char c = s[i];
    if (c == '\n') line++;
    if (isspace((unsigned char)c)) {
      i++;
    } else if (s.compare(i, 2, "//") == 0) {
      size_t end = std::min(s.find('\n', i), s.size());
      std::string_view comment = s.substr(i, end - i);
      if (comment == "// begin inline asm") inlined = true;
      if (comment == "// end inline asm") inlined = false;
      i = end;
    } else if (s.compare(i, 2, "/*") == 0) {
      size_t end = std::min(s.find("*/", i + 2), s.size() - 2) + 2;
      line += (uint32_t)std::count(s.begin() + i, s.begin() + end, '\n');
      i = end;
    } else if (c == '"') {
      size_t end = s.find('"', i + 1);
      if (end == s.npos) wrong(m, line, "a string does not end");
      push(i, end + 1 - i);
      i = end + 1;
    } else if (is_word(c)) {
      size_t end = i + 1;
      while (end < s.size() &&
             (is_word(s[end]) || (s.compare(end, 2, "::") == 0 && end + 2 < s.size() && is_word(s[end + 2])))) {
        end += s[end] == ':' ? 2 : 1;
      }
      push(i, end - i);
      i = end;
    } else {
      push(i, 1);
      i++;
    }
  }
}
uint64_t number(const Module& m, const Token& t) {
  std::string s(t.text);
  if (!s.empty() && s.back() == 'U') s.pop_back();
  if (s.size() > 2 && isdigit((unsigned char)s[0]) && s.find('.') != s.npos) {  // a fraction, as the bits of an f32
    char* end;
    float f = strtof(s.c_str(), &end);
    if (!*end) return bits_of<uint32_t>(f);
  }
  bool bits = s[0] == '0' && s.size() > 2 && strchr("fFdD", s[1]);
  char* end;
  uint64_t v = bits ? strtoull(s.c_str() + 2, &end, 16) : strtoull(s.c_str(), &end, 0);
  if (!isdigit((unsigned char)s[0]) || *end)
    wrong(m, t.line, "expected a number and found \"" + std::string(t.text) + "\"");
  return v;
}
uint64_t number_up_to(uint64_t most, const Module& m, const Token& t) {
  uint64_t v = number(m, t);
  if (v > most) wrong(m, t.line, std::string(t.text) + " is more than " + std::to_string(most));
  return v;
}
unsigned type_bytes(const Module& m, const Token& t) {
  std::string s(t.text);
  if (s == ".pred") return 0;
  int bits = s.size() > 2 && strchr("busf", s[1]) ? atoi(s.c_str() + 2) : 0;
  if (bits != 8 && bits != 16 && bits != 32 && bits != 64) wrong(m, t.line, "unknown type \"" + s + "\"");
  return bits / 8;
}
constexpr uint64_t MOST_BYTES = 1 << 20;  // of a variable: more than any space that is kept has
Declared variable(Reader& r) {
  Declared d{"", {0, 0, false}};
  unsigned size = 0;
  for (;;) {
    const Token& t = r.take();
    if (t.text == ".align") {
      const Token& written = r.take();
      unsigned align = (unsigned)number_up_to(4096, r.m, written);
      if (!align || align & (align - 1)) wrong(r.m, written.line, "an alignment is a power of two");
      if (!size) d.v.align = align;  // after a pointer's type it is what it points to
    } else if (t.text == ".ptr" || t.text == ".global" || t.text == ".shared" || t.text == ".const" ||
               t.text == ".local") {
      continue;
    } else if (t.text[0] == '.') {
      size = type_bytes(r.m, t);
    } else {
      d.name = t.text;
      break;
    }
  }
  if (!size || !is_word(d.name[0])) wrong(r.m, r.m.tokens[r.at - 1].line, "expected a type and a name");
  d.v.bytes = size;
  if (r.skip("[")) {
    d.v.dynamic = r.next_is("]");
    d.v.bytes = d.v.dynamic ? 0 : size * (unsigned)number_up_to(MOST_BYTES, r.m, r.take());
    r.expect("]");
  }
  d.v.align = std::max(d.v.align, size);
  return d;
}
static void kernel(Module& m, Reader& r) {
  const Token& name = r.take();
  if (!is_word(name.text[0])) wrong(m, name.line, "expected a kernel's name and found \"" + std::string(name.text) + "\"");
  Kernel k{{r.at, r.at}, {}, name.line};
  try {
    if (r.skip("(")) {
      k.parameters.begin = r.at;
      while (!r.next_is(")")) r.take();
      k.parameters.end = r.at;
      r.expect(")");
    }
    while (!r.next_is("{")) r.take();  // .maxntid and the like
    k.body = r.skip_braces();
  } catch (const Error& e) {
    throw Error{e.text + " in kernel " + std::string(name.text)};
  }
  if (!m.kernels.emplace(name.text, k).second) {
    wrong(m, name.line, "kernel " + std::string(name.text) + " is there twice");
  }
}
std::shared_ptr<Module> parse(std::string text, std::string file) {
  auto module = std::make_shared<Module>();
  Module& m = *module;
  m.text = std::move(text);
  m.file = std::move(file);
  tokenise(m);
  Reader r{m, 0, m.tokens.size()};
  if (!r.next_is(".version")) wrong(m, 1, "no PTX: it does not begin with .version");
  while (!r.done()) {
    const Token& t = r.take();
    if (t.text == ".version" || t.text == ".address_size") {
      r.take();
    } else if (t.text == ".target") {
      m.target = r.take().text;
      while (r.skip(",")) r.take();
    } else if (t.text == ".visible" || t.text == ".extern" || t.text == ".weak") {
      continue;
    } else if (t.text == ".shared") {
      Declared d = variable(r);
      m.shared[d.name] = d.v;
      r.expect(";");
    } else if (t.text == ".entry") {
      kernel(m, r);
    } else if (t.text == ".func") {
      while (!r.next_is("{") && !r.next_is(";")) r.take();
      if (!r.skip(";")) r.skip_braces();
    } else if (t.text == ".file") {
      std::string number(r.take().text), path(r.peek().text);
      if (path.size() < 2 || path[0] != '"') wrong(m, t.line, "expected a path in quotes and found \"" + path + "\"");
      path = path.substr(1, path.size() - 2);
      m.sources[number] = path.substr(path.rfind('/') + 1);  // all of it where there is none: npos + 1 is 0
      r.skip_line();
    } else if (t.text == ".section") {
      r.take();
      r.skip_braces();
    } else if (t.text == ".global" || t.text == ".const" || t.text == ".pragma") {
      r.skip_statement();  // a kernel that names the variable is refused
    } else {
      wrong(m, t.line, "expected a directive and found \"" + std::string(t.text) + "\"");
    }
  }
  return module;
}
const Entry* entry(Module& m, const std::string& name) {
  auto k = m.kernels.find(name);
  if (k == m.kernels.end()) return nullptr;
  auto known = m.compiled.find(name);
  if (known != m.compiled.end()) return known->second.get();
  auto e = compile(m, name, k->second);  // may throw
  return (m.compiled[name] = std::move(e)).get();
}
std::vector<std::string> entries(const Module& m) {
  std::vector<std::string> names;
  for (auto& k : m.kernels) names.push_back(k.first);
  return names;
}
std::string architecture(const Module& m) { return m.target; }
}  // namespace ptx
