// compile.cpp - turns a kernel's statements into instructions whose operands are indices into a register file.
#include <algorithm>
#include <unordered_map>

#include "engine.h"
#include "text.h"

namespace ptx {
struct Written {  // an operand as it is written
  enum { REGISTER, NUMBER, NAME, ADDRESS, SINK } kind;
  Operand operand;   // of a register, or of an address its register
  std::string name;  // of a label or variable, or of an address that begins with one
  bool fixed = false;  // a register that no instruction writes: %tid.x
};
struct Scope {
  struct Registers {
    uint8_t width;
    std::vector<uint32_t> at;  // 0: not used so far
  };
  std::unordered_map<std::string, Registers> registers;  // without the digits at the end of their names
  std::map<std::string, size_t> labels;
  int outer;
};
struct Compiler {
  const Module& m;
  Reader r;
  Entry& e;
  std::vector<Scope> scopes;
  int scope = 0;
  std::map<std::string, unsigned> locals, parameters, shared;  // their offsets
  std::map<std::string, std::vector<std::string>> targets;     // of .branchtargets
  std::map<std::pair<uint8_t, uint64_t>, uint32_t> constants;
  std::map<std::string, uint32_t> specials;
  struct Label {
    Operand* operand;
    std::string name;
    int scope;
    uint32_t line;
  };
  std::vector<Label> labels;
  uint32_t predicates = 0, top = 64;  // the next predicate, the end of the register file
  uint32_t scratch = 0;
  size_t shared_bytes = 0;
  int source_line = 0;

  [[noreturn]] void fail(uint32_t line, const std::string& what) { wrong(m, line, what); }

  // --- places
  uint32_t place(uint8_t width) {
    if (!width) {  // sixteen predicates share a line
      if (predicates % 64 == 0) predicates = top, top += 64;
      predicates += 4;
      return predicates - 4;
    }
    top += 32u * width;
    return top - 32 * width;
  }
  Operand constant(uint8_t width, uint64_t value) {
    if (width && width < 8) value &= (1ull << width * 8) - 1;
    uint32_t& at = constants[{width, value}];
    if (!at) e.constants.push_back({at = place(width), width, value});
    Operand o;
    o.at = at, o.width = width, o.number = (int64_t)value;
    return o;
  }
  Operand special(const std::string& key, uint8_t width, SpecialKind kind, unsigned which) {
    uint32_t& at = specials[key];
    if (!at) e.specials.push_back({at = place(width), kind, which});
    Operand o;
    o.at = at, o.width = width;
    return o;
  }
  static std::pair<std::string, size_t> numbered(std::string_view name) {  // %r12: %r and 12; without a number: -1
    size_t digits = name.size();
    while (digits && isdigit((unsigned char)name[digits - 1])) digits--;
    bool has = digits < name.size() && name.size() - digits < 9;
    return {std::string(name.substr(0, has ? digits : name.size())),
            has ? atoi(std::string(name.substr(digits)).c_str()) : size_t(-1)};
  }
  bool find_register(std::string_view name, Operand& o) {
    auto [prefix, index] = numbered(name);
    std::string whole(name);
    for (int s = scope; s >= 0; s = scopes[s].outer) {
      auto& registers = scopes[s].registers;
      auto range = index == size_t(-1) ? registers.end() : registers.find(prefix + "<");
      size_t i = index;
      if (range == registers.end() || index >= range->second.at.size()) range = registers.find(whole), i = 0;
      if (range == registers.end()) continue;
      uint32_t& at = range->second.at[i];
      if (!at) at = place(range->second.width);
      o.at = at, o.width = range->second.width;
      return true;
    }
    return false;
  }
  bool find_special(const std::string& name, Operand& o) {
    static const std::map<std::string, SpecialKind> vectors = {{"%tid", TID},
                                                               {"%ntid", NTID},
                                                               {"%ctaid", CTAID},
                                                               {"%nctaid", NCTAID}},
                                                    scalars = {{"%laneid", LANE},         {"%warpid", WARP},
                                                               {"%nwarpid", WARPS},       {"%lanemask_eq", MASK_EQ},
                                                               {"%lanemask_lt", MASK_LT}, {"%lanemask_le", MASK_LE},
                                                               {"%lanemask_gt", MASK_GT}, {"%lanemask_ge", MASK_GE}};
    size_t dot = name.rfind('.');
    auto s = scalars.find(name);
    if (s != scalars.end()) return o = special(name, 4, s->second, 0), true;
    auto v = dot == name.npos ? vectors.end() : vectors.find(name.substr(0, dot));
    if (v == vectors.end() || dot + 2 != name.size() || name.back() < 'x' || name.back() > 'z') return false;
    return o = special(name, 4, v->second, name.back() - 'x'), true;
  }
  bool find_variable(const std::string& name, uint64_t& at) {
    auto known = shared.find(name);
    if (known != shared.end()) return at = known->second, true;
    auto local = locals.find(name);
    if (local != locals.end()) return at = local->second, true;
    auto v = m.shared.find(name);
    if (v == m.shared.end()) return false;
    at = shared[name] = v->second.dynamic ? (unsigned)emu::SHARED_DYN : share(v->second);
    return true;
  }
  unsigned share(const Variable& v) {  // with a red zone between arrays
    unsigned at = (e.shared_top + v.align - 1) / v.align * v.align;
    e.shared_top = at + v.bytes + 64;
    e.shared.push_back({at, v.bytes});
    shared_bytes += v.bytes;
    if (shared_bytes > (48 << 10) || e.shared_top > emu::SHARED_DYN) {
      fail(r.m.tokens[r.at - 1].line, "static shared memory over 48 KiB");
    }
    return at;
  }

  // --- declarations
  void declare_registers() {
    uint8_t width = (uint8_t)type_bytes(m, r.take());
    do {
      std::string name(r.take().text);
      size_t count = 1;
      if (r.skip("<")) {
        count = number_up_to(1 << 20, m, r.take());
        name += "<";
        r.expect(">");
      }
      scopes[scope].registers[name] = {width, std::vector<uint32_t>(count)};
    } while (r.skip(","));
    r.expect(";");
  }
  void declare_parameters(Range range) {
    Reader p{m, range.begin, range.end};
    while (!p.done()) {
      p.expect(".param");
      Declared d = variable(p);
      unsigned at = (e.param_bytes + d.v.align - 1) / d.v.align * d.v.align;
      parameters[d.name] = at;
      e.params.push_back({at, d.v.bytes});
      e.sizes.push_back(d.v.bytes);
      e.param_bytes = at + d.v.bytes;
      if (!p.done()) p.expect(",");
    }
  }

  // --- operands
  void address(std::vector<Written>& to) {  // [base+offset], and coordinates after it
    Written w{Written::ADDRESS, {}, ""};
    const Token& base = r.take();
    uint64_t at = 0;
    if (!find_register(base.text, w.operand)) {
      std::string name(base.text);
      if (parameters.count(name)) {
        w.name = name;
        w.operand.number = parameters[name];
      } else if (find_variable(name, at)) {
        w.operand = constant(4, 0);
        w.operand.number = (int64_t)at;
      } else if (isdigit((unsigned char)name[0])) {
        w.operand = constant(8, 0);
        w.operand.number = (int64_t)number(m, base);
      } else {
        fail(base.line, "unknown address \"" + name + "\"");
      }
    } else {
      w.operand.number = 0;
    }
    if (r.skip("+")) {
      bool negative = r.skip("-");
      int64_t offset = (int64_t)number(m, r.take());
      w.operand.number += negative ? -offset : offset;
    } else if (r.skip("-")) {
      w.operand.number -= (int64_t)number(m, r.take());
    }
    to.push_back(w);
    if (r.skip(",")) {
      if (r.next_is("[")) fail(base.line, "an address in an address");
      operand(to);
    }
    r.expect("]");
  }
  void operand(std::vector<Written>& to) {
    const Token& t = r.take();
    if (t.text == "{") {
      do {
        if (r.next_is("{")) fail(t.line, "braces in braces");
        operand(to);
      } while (r.skip(","));
      return r.expect("}");
    }
    if (t.text == "[") return address(to);
    if (t.text == "_") return to.push_back({Written::SINK, {}, ""});
    Written w{Written::REGISTER, {}, ""};
    if (t.text == "!") {
      if (!find_register(r.take().text, w.operand) || w.operand.width) fail(t.line, "expected a predicate after !");
      w.operand.negated = true;
      return to.push_back(w);
    }
    std::string name(t.text);
    if (t.text == "-" || isdigit((unsigned char)name[0])) {
      uint64_t v = number(m, t.text == "-" ? r.take() : t);
      w.kind = Written::NUMBER;
      w.operand.number = (int64_t)(t.text == "-" ? 0 - v : v);
      return to.push_back(w);
    }
    if (!find_register(t.text, w.operand)) {
      w.fixed = find_special(name, w.operand);
      if (!w.fixed) w.kind = Written::NAME, w.name = name;
    }
    to.push_back(w);
    if (r.skip("|")) {
      const Token& second = r.peek();
      size_t before = to.size();
      operand(to);
      if (to.size() != before + 1 || to.back().kind == Written::ADDRESS) fail(second.line, "expected a register after |");
    }
  }
  // The operand for a letter of a form; false: it is none.
  bool fits(const Written& w, char letter, bool result, Operand& o) {
    static const std::map<char, uint8_t> least = {{'b', 1}, {'h', 2}, {'w', 4}, {'d', 8}},
                                         exact = {{'2', 2}, {'4', 4}, {'8', 8}};
    o = w.operand;
    if (result && w.fixed) return false;
    if (letter == 'l') return w.kind == Written::NAME;
    if (letter == 'i') return w.kind == Written::NUMBER;
    if (letter == 'a') return w.kind == Written::ADDRESS && w.name.empty();
    if (letter == 'm') return w.kind == Written::ADDRESS && !w.name.empty();
    if (w.kind == Written::SINK) return result && (o = sink(letter), true);
    if (letter == 'p') {
      if (w.kind == Written::NUMBER && !result) return o = constant(0, w.operand.number ? ~0u : 0), true;
      return w.kind == Written::REGISTER && !o.width;
    }
    auto e = exact.find(letter), l = least.find(letter);
    uint8_t width = e != exact.end() ? e->second : l->second;
    if (w.kind == Written::NUMBER) return !result && (o = constant(width, (uint64_t)w.operand.number), true);
    if (w.kind == Written::NAME) return !result && address_of(w.name, width, o);
    return w.kind == Written::REGISTER && (e != exact.end() ? o.width == width : o.width >= width);
  }
  Operand sink(char letter) {
    if (!scratch) scratch = place(8);
    Operand o;
    o.at = scratch;
    o.width = letter == 'p' ? 0 : letter == '2' ? 2 : letter == '4' ? 4 : 8;
    return o;
  }
  bool address_of(const std::string& name, uint8_t width, Operand& o) {
    uint64_t at;
    if (parameters.count(name) && width == 8) return o = special(name, 8, PARAM, parameters[name]), true;
    return find_variable(name, at) && (o = constant(width, at), true);
  }

  // --- instructions
  static bool is_volatile(std::string_view name) {
    return name == "%globaltimer" || name == "%clock" || name == "%clock64" || name == "%smid";
  }
  void emit(Run run, const Form& form, const std::vector<Operand>& operands, const Instr& like) {
    Instr in = like;
    auto copy = std::make_unique<Operand[]>(operands.size() + 1);
    std::copy(operands.begin(), operands.end(), copy.get());
    in.run = run;
    in.kind = run == form.run ? form.kind : PLAIN;
    in.x = form.x;
    in.n = (uint16_t)operands.size();
    in.op = copy.get();
    e.operands.push_back(std::move(copy));
    e.code.push_back(std::move(in));
  }
  bool emit_form(const Form& form, const std::vector<Written>& written, const Instr& like) {
    std::string letters = form.operands;
    size_t results = letters.find(':');
    letters.erase(results, 1);
    if (letters.size() != written.size()) return false;
    std::vector<Operand> operands(written.size());
    for (size_t i = 0; i < written.size(); i++) {
      if (!fits(written[i], letters[i], i < results, operands[i])) return false;
    }
    emit(form.run, form, operands, like);
    Operand* placed = e.operands.back().get();
    for (size_t i = 0; i < written.size(); i++) {
      if (letters[i] == 'l') labels.push_back({placed + i, written[i].name, scope, like.line});
    }
    if (form.then) emit(form.then, form, operands, like);
    return true;
  }
  void instruction() {
    size_t first = r.at;
    Instr like{};
    like.line = r.peek().line;
    like.entry = &e;
    like.source = source_line;
    like.inlined = r.peek().inlined;
    if (r.skip("@")) {
      Operand p;
      like.unless = r.skip("!");
      const Token& t = r.take();
      if (!find_register(t.text, p) || p.width) fail(t.line, "\"" + std::string(t.text) + "\" is no predicate");
      like.guarded = true;
      like.guard = p.at;
    }
    std::string name(r.take().text);
    std::vector<Written> written;
    if (name.rfind("mov.", 0) == 0 && r.at + 2 < r.end && is_volatile(m.tokens[r.at + 2].text)) {
      operand(written);
      r.expect(",");
      name += " " + std::string(r.take().text);
    }
    while (!r.next_is(";")) {
      operand(written);
      if (!r.skip(",")) break;
    }
    if (!r.next_is(";")) fail(r.peek().line, "expected \";\" and found \"" + std::string(r.peek().text) + "\"");
    const char* begin = m.tokens[first].text.data();
    like.text.assign(begin, r.peek().text.data() - begin);
    r.expect(";");
    if (name == "brx.idx" || name == "brx.idx.uni") return branch_table(written, like);
    std::vector<Form> known = forms(name);
    if (known.empty()) fail(like.line, "unknown instruction \"" + like.text + "\"");
    for (auto& form : known) {
      if (emit_form(form, written, like)) return;
    }
    fail(like.line, "operands that do not fit, or an unknown name, in \"" + like.text + "\"");
  }
  void branch_table(std::vector<Written>& written, const Instr& like) {
    auto list = written.size() == 2 ? targets.find(written[1].name) : targets.end();
    if (list == targets.end()) fail(like.line, "no .branchtargets for \"" + like.text + "\"");
    written.pop_back();
    for (auto& label : list->second) written.push_back({Written::NAME, {}, label});
    if (!emit_form({nullptr, ":4" + std::string(list->second.size(), 'l'), SWITCH}, written, like))
      fail(like.line, "a wrong index in \"" + like.text + "\"");
  }
  void branch_targets(const std::string& name) {
    auto& list = targets[name];
    do list.push_back(std::string(r.take().text));
    while (r.skip(","));
    r.expect(";");
  }
  void statement() {
    if (r.skip("{")) {
      scopes.push_back({});
      scopes.back().outer = scope;
      scope = (int)scopes.size() - 1;
    } else if (r.next_is("}")) {
      if (scopes[scope].outer < 0) fail(r.peek().line, "\"}\" without \"{\"");
      r.take();
      scope = scopes[scope].outer;
    } else if (r.skip(".reg")) {
      declare_registers();
    } else if (r.skip(".shared")) {
      Declared d = variable(r);
      shared[d.name] = share(d.v);
      r.expect(";");
    } else if (r.skip(".local")) {
      Declared d = variable(r);
      e.local_bytes = (e.local_bytes + d.v.align - 1) / d.v.align * d.v.align;
      locals[d.name] = e.local_bytes;
      e.local_bytes += d.v.bytes;
      if (e.local_bytes > (32 << 10)) fail(r.peek().line, "more than 32 KiB of local memory a thread");
      r.expect(";");
    } else if (r.skip(".pragma")) {
      r.skip_statement();
    } else if (r.next_is(".loc")) {
      if (r.at + 2 >= r.end) fail(r.peek().line, ".loc without a place");
      auto source = m.sources.find(std::string(m.tokens[r.at + 1].text));
      bool own = source != m.sources.end() && source->second.size() > 3 &&
                 source->second.substr(source->second.size() - 3) == ".cu";
      if (own) source_line = (int)number(m, m.tokens[r.at + 2]), e.source = source->second;
      r.skip_line();
    } else if (r.at + 1 < r.end && m.tokens[r.at + 1].text == ":") {
      std::string name(r.take().text);
      r.expect(":");
      if (r.skip(".branchtargets")) return branch_targets(name);
      scopes[scope].labels[name] = e.code.size();
    } else {
      instruction();
    }
  }
  void resolve_labels() {
    for (auto& l : labels) {
      int s = l.scope;
      while (s >= 0 && !scopes[s].labels.count(l.name)) s = scopes[s].outer;
      if (s < 0) fail(l.line, "unknown label \"" + l.name + "\"");
      l.operand->number = (int64_t)scopes[s].labels[l.name];
    }
  }
};

std::unique_ptr<Entry> compile(const Module& m, const std::string& name, const Kernel& k) {
  auto e = std::make_unique<Entry>();
  e->name = name;
  e->file = m.file;
  Compiler c{m, {m, k.body.begin, k.body.end}, *e, {}, 0, {}, {}, {}, {}, {}, {}, {}};
  c.scopes.push_back({});
  c.scopes[0].outer = -1;
  try {
    c.declare_parameters(k.parameters);
    while (!c.r.done()) c.statement();
    Instr end{};  // running off the end is a return
    end.line = m.tokens[k.body.end].line;
    end.entry = e.get();
    end.text = "}";
    c.emit(nullptr, {nullptr, ":", EXIT}, {}, end);
    c.resolve_labels();
  } catch (const Error& error) {
    throw Error{error.text + " in kernel " + name};
  }
  e->file_bytes = c.top;
  e->kernel = {e->name.c_str(), nullptr, (unsigned)e->sizes.size(), e->sizes.data(), e.get()};
  return e;
}
}  // namespace ptx
