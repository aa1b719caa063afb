"""Entries that come from tables: one question pattern, many facts."""

from korean import josa

CAPITALS = """대한민국 서울, 일본 도쿄, 중국 베이징, 몽골 울란바토르, 베트남 하노이, 태국 방콕, 라오스 비엔티안, 캄보디아 프놈펜,
필리핀 마닐라, 말레이시아 쿠알라룸푸르, 인도 뉴델리, 네팔 카트만두, 방글라데시 다카, 파키스탄 이슬라마바드, 아프가니스탄 카불,
이란 테헤란, 이라크 바그다드, 튀르키예 앙카라, 사우디아라비아 리야드, 카타르 도하, 아랍에미리트 아부다비, 카자흐스탄 아스타나,
우즈베키스탄 타슈켄트, 러시아 모스크바, 우크라이나 키이우, 폴란드 바르샤바, 독일 베를린, 프랑스 파리, 영국 런던, 아일랜드 더블린,
스페인 마드리드, 포르투갈 리스본, 이탈리아 로마, 그리스 아테네, 오스트리아 빈, 스위스 베른, 벨기에 브뤼셀, 네덜란드 암스테르담,
덴마크 코펜하겐, 노르웨이 오슬로, 스웨덴 스톡홀름, 핀란드 헬싱키, 아이슬란드 레이캬비크, 체코 프라하, 헝가리 부다페스트,
루마니아 부쿠레슈티, 이집트 카이로, 모로코 라바트, 케냐 나이로비, 에티오피아 아디스아바바, 미국 워싱턴 D.C., 캐나다 오타와,
멕시코 멕시코시티, 쿠바 아바나, 브라질 브라질리아, 아르헨티나 부에노스아이레스, 칠레 산티아고, 페루 리마, 콜롬비아 보고타,
호주 캔버라, 뉴질랜드 웰링턴"""

ELEMENTS = """수소 H 1, 헬륨 He 2, 리튬 Li 3, 탄소 C 6, 질소 N 7, 산소 O 8, 플루오린 F 9, 네온 Ne 10, 나트륨 Na 11, 마그네슘 Mg 12,
알루미늄 Al 13, 규소 Si 14, 인 P 15, 황 S 16, 염소 Cl 17, 칼륨 K 19, 칼슘 Ca 20, 철 Fe 26, 니켈 Ni 28, 구리 Cu 29, 아연 Zn 30,
은 Ag 47, 주석 Sn 50, 금 Au 79, 수은 Hg 80, 납 Pb 82, 우라늄 U 92"""

ENGLISH = """사과 apple, 물 water, 학교 school, 책 book, 친구 friend, 고양이 cat, 강아지 puppy, 하늘 sky, 바다 sea, 산 mountain,
나무 tree, 꽃 flower, 시간 time, 가족 family, 사랑 love, 행복 happiness, 도서관 library, 병원 hospital, 기차 train, 비행기 airplane"""

UNITS = """1킬로미터 1,000미터, 1미터 100센티미터, 1센티미터 10밀리미터, 1킬로그램 1,000그램, 1톤 1,000킬로그램, 1리터 1,000밀리리터,
1시간 60분, 1분 60초, 하루 24시간, 1년 12개월, 1인치 2.54센티미터, 1기가바이트 1,000메가바이트"""

PROVINCES = """경기도 수원, 강원특별자치도 춘천, 충청북도 청주, 충청남도 홍성군 홍북읍, 전북특별자치도 전주, 전라남도 무안군 삼향읍,
경상북도 안동, 경상남도 창원, 제주특별자치도 제주시"""

PROVERBS = {
    "가는 말이 고와야 오는 말이 곱다": "내가 남에게 좋게 말해야 남도 나에게 좋게 말한다",
    "발 없는 말이 천 리 간다": "말은 빠르고 멀리 퍼지므로 조심해야 한다",
    "낮말은 새가 듣고 밤말은 쥐가 듣는다": "아무도 없는 곳에서도 말을 조심해야 한다",
    "티끌 모아 태산": "아무리 작은 것도 모으면 큰 것이 된다",
    "천 리 길도 한 걸음부터": "아무리 큰 일도 작은 시작이 중요하다",
    "소 잃고 외양간 고친다": "일이 잘못된 뒤에는 손을 써도 소용이 없다",
    "원숭이도 나무에서 떨어진다": "아무리 익숙한 일도 실수할 때가 있다",
    "호랑이도 제 말 하면 온다": "이야기하던 사람이 마침 그 자리에 나타난다",
    "백지장도 맞들면 낫다": "쉬운 일이라도 함께하면 더 쉽다",
    "우물 안 개구리": "보고 들은 것이 적어 넓은 세상을 모른다",
    "등잔 밑이 어둡다": "가까이 있는 것을 오히려 잘 알지 못한다",
    "하늘이 무너져도 솟아날 구멍이 있다": "아무리 어려워도 벗어날 방법은 있다",
    "고래 싸움에 새우 등 터진다": "강한 사람들의 싸움에 약한 사람이 피해를 본다",
    "빈 수레가 요란하다": "아는 것이 적은 사람이 더 시끄럽게 떠든다",
    "벼는 익을수록 고개를 숙인다": "훌륭한 사람일수록 겸손하다",
    "콩 심은 데 콩 나고 팥 심은 데 팥 난다": "모든 일은 원인에 따라 결과가 생긴다",
    "돌다리도 두들겨 보고 건너라": "잘 아는 일이라도 조심해야 한다",
    "세 살 버릇 여든까지 간다": "어릴 때의 버릇은 늙어서도 고치기 어렵다",
    "금강산도 식후경": "아무리 좋은 구경도 배가 불러야 즐길 수 있다",
    "공든 탑이 무너지랴": "정성을 다한 일은 쉽게 헛되지 않는다",
    "사공이 많으면 배가 산으로 간다": "참견하는 사람이 많으면 일이 엉뚱하게 된다",
    "바늘 도둑이 소도둑 된다": "작은 잘못도 되풀이하면 큰 잘못이 된다",
    "누워서 떡 먹기": "아주 하기 쉽다",
    "식은 죽 먹기": "아주 쉽게 할 수 있다",
    "그림의 떡": "마음에 들어도 가질 수 없다",
}


def rows(text):
    """'a b c, d e' -> [['a', 'b c'], ['d', 'e']]: the first word is the key."""
    return [cell.strip().split(" ", 1) for cell in text.replace("\n", " ").split(", ")]


def entries():
    """Yield (topic, [question and its paraphrases], answer)."""
    for country, city in rows(CAPITALS):
        yield "capitals", [
            f"{country}의 수도는 어디야?", f"{country}의 수도는 어디인가요?", f"{country} 수도가 어디야?",
            f"{country}의 수도를 알려줘", f"{country}의 수도는?",
        ], f"{country}의 수도는 {city}{josa(city, '이에요', '예요')}."
    for name, rest in rows(ELEMENTS):
        symbol, number = rest.split()
        yield "elements", [
            f"{name}의 원소 기호가 뭐야?", f"{name}의 원소 기호는 무엇인가요?", f"{name}의 원자 번호는 몇 번이야?",
            f"{name}의 원소 기호를 알려줘", f"{name}의 원소 기호는?",
        ], f"{name}의 원소 기호는 {symbol}이고 원자 번호는 {number}번이에요."
    for korean, english in rows(ENGLISH):
        yield "words", [
            f"{korean}{josa(korean, '을', '를')} 영어로 뭐라고 해?", f"{korean}{josa(korean, '은', '는')} 영어로 뭐야?",
            f"{korean}{josa(korean, '을', '를')} 영어로 말해줘",
        ], f"{korean}{josa(korean, '은', '는')} 영어로 {english}입니다."
    for unit, value in rows(UNITS):
        small = value.lstrip("0123456789.,")
        yield "units", [
            f"{unit}{josa(unit, '은', '는')} 몇 {small}{josa(small, '이야', '야')}?",
            f"{unit}{josa(unit, '이', '가')} 몇 {small}인지 알려줘",
        ], f"{unit}{josa(unit, '은', '는')} {value}{josa(value, '이에요', '예요')}."
    for province, city in rows(PROVINCES):
        yield "provinces", [
            f"{province}의 도청은 어디에 있어?", f"{province} 도청 소재지가 어디야?", f"{province}의 도청 소재지를 알려줘",
        ], f"{province}의 도청은 {city}에 있어요."
    for proverb, meaning in PROVERBS.items():
        yield "proverbs", [
            f"'{proverb}'의 뜻이 뭐야?", f"{proverb}{josa(proverb, '이', '가')} 무슨 뜻이야?",
            f"'{proverb}'라는 속담의 뜻을 알려줘", f"{proverb}의 뜻을 알려주세요",
        ], f"'{proverb}'{josa(proverb, '은', '는')} {meaning}는 뜻의 속담이에요."
    for a in range(2, 10):
        for b in range(2, 10):
            product, topic = str(a * b), josa(str(b), "은", "는")
            yield "times", [
                f"{a} 곱하기 {b}{topic} 얼마야?", f"{a}x{b}{topic}?", f"{a} 곱하기 {b}{topic}?",
            ], f"{a} 곱하기 {b}{topic} {product}{josa(product, '이에요', '예요')}."
